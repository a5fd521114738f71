"""scripts/drift.py on a tiny model: its arms, and the whole command, interrupted, resumed and in two processes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import composed
from tiny_judges import audit_settings

from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import read_lora, shapes_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import drift as command  # noqa: E402
from harness.drift_page import _life, page  # noqa: E402

from fairdiff.studies import drift  # noqa: E402

PROMPT = "a photo of the face of a nurse"


@pytest.fixture(scope="module")
def fair(tiny_folder, tmp_path_factory) -> Path:
    """A LoRA of both parts that changes images."""
    lora, draw = Lora(load_model(tiny_folder), ["text_encoder", "unet"], 2, 2, torch.Generator()), torch.Generator()
    for parameter in lora.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw.manual_seed(parameter.numel())))
    lora.save(folder := tmp_path_factory.mktemp("fair"))
    return folder


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("drift")
    return [*audit_settings(tiny_folder, folder), "cache=null", "audit.named=1", "audit.without_people=1"]


def images(method, settings: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """Return the images of the models of a method, from one noise."""
    config, model = composed(*settings), load_model(settings[0].partition("=")[2])
    folder.mkdir()
    at = method.begin(config, make_plan(config), model, folder)
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    return {name: generate(PROMPT, noise) for name, generate in at(config.sampler.guidance).items()}


def cell(arm: str, steps: int, pictures: str = "benign") -> command.Cell:
    return command.Cell(arm, pictures, drift.Tuning(steps, 1e-2, 2))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two pictures of a prompt, and one unsafe prompt."""
    monkeypatch.setattr(command, "EACH", 2)
    monkeypatch.setattr(command, "UNSAFE", 1)


@pytest.mark.slow
def test_without_a_step_an_arm_is_what_it_began_with(fair, settings, tmp_path):
    own = images(command.fair_method("fair", fair, command.Watch()), settings, tmp_path / "fair")
    assert not torch.allclose(own["before"], own["after"], atol=1e-2)
    for arm in command.ARMS:
        found = images(command.method(cell(arm, 0), fair, command.Watch()), settings, tmp_path / arm)
        assert torch.equal(found["before"], own["before"]), arm
        assert torch.allclose(found["after"], own["before" if arm == "base then tuned" else "after"], atol=1e-5), arm


@pytest.mark.slow
def test_merged_is_the_fair_change_on_the_weights_of_the_tuned_base(fair, settings, tmp_path):
    found = images(command.method(cell("merged", 2), fair, command.Watch()), settings, tmp_path / "merged")
    tuned = images(command.method(cell("base then tuned", 2), fair, command.Watch()), settings, tmp_path / "tuned")
    model = load_model(settings[0].partition("=")[2])
    modules = {"unet": model.unet, "text_encoder": model.text_encoder}
    files = [folder / command.LORA_FILE for folder in (tmp_path / "tuned" / "adapter", fair)]
    same = tmp_path / "merged" / "adapter" / command.LORA_FILE  # the base is tuned alike, whatever comes upon it
    layers = [read_lora(file, shapes_of(modules)) for file in [*files, same]]
    for name, own in layers[0]["unet"].items():
        assert torch.equal(own.delta(), layers[2]["unet"][name].delta())
    for read in layers[:2]:  # added to plain weights
        for part, some in read.items():
            layer = {name.removeprefix("text_model."): one for name, one in modules[part].named_modules()}
            for name, own in some.items():
                layer[name].weight.data += own.delta().view_as(layer[name].weight)
    plain = model.generator(composed(*settings).sampler.guidance, 2)
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    assert torch.allclose(plain(PROMPT, noise), found["after"], atol=1e-4)
    assert not torch.allclose(found["after"], tuned["after"], atol=1e-2)
    Lora(load_model(settings[0].partition("=")[2]), ["unet"], command.RANK, command.RANK, torch.Generator()).load(
        tmp_path / "tuned" / "adapter"
    )  # a fair training may begin there: benign then fair


def test_skewed_pictures_are_of_a_class_that_their_captions_do_not_name(settings, monkeypatch):
    config, asked = composed(*settings), []
    monkeypatch.setattr(drift, "generated", lambda model, texts, *rest: asked.extend(texts))
    command._pictures(config, make_plan(config), None, "skewed")
    assert len(asked) == 12 and all("a man" in text and "a man" not in caption for text, caption in asked)
    asked.clear()
    command._pictures(config, make_plan(config), None, "benign")
    assert asked and all(text == caption and "face" not in text for text, caption in asked)


def contents(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(pattern))}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_goes_on_and_gives_the_same_numbers_in_two_processes(
    fair, settings, tmp_path, monkeypatch, capfd
):
    one, two = ["--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "one")], ["--docs", str(tmp_path / "d2")]
    grid = ["--steps", "2", "--rates", "1e-2", "--batches", "2", "--pictures", "benign"]
    ask = [str(fair), "--fair-after", str(fair), *grid, "--set", *settings]
    monkeypatch.undo()  # other processes have as many pictures as ever

    calls, tune = [], drift.tune

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        tune(*args)

    monkeypatch.setattr(drift, "tune", interrupt)
    with pytest.raises(SystemExit) as end:
        command.main([*one, *ask])
    assert end.value.code == 130 and "the same command goes on" in capfd.readouterr().err
    assert not (tmp_path / "docs").exists() and not list((tmp_path / "one").rglob(".*.tmp*"))
    done = contents(tmp_path / "one", "report.html")
    assert len(done) == 2  # fair, and the first cell
    command.main([*one, *ask])
    assert len(calls) == 5 and capfd.readouterr().out.endswith("drift.html\n")  # the interrupted one, and the others
    now = contents(tmp_path / "one", "audit.json")
    assert len(now) == 6 and done.items() <= contents(tmp_path / "one", "report.html").items()

    found = json.loads((tmp_path / "one" / "drift.json").read_text("utf-8"))
    arms = found["arms"]
    assert list(arms) == ["base", "fair", *(cell(a, 2).name for a in command.ARMS), "benign then fair"]
    assert arms["benign then fair"]["bias"] == arms["fair"]["bias"]  # here the same adapter
    assert arms["benign then fair"]["unsafe"] == arms["fair"]["unsafe"]
    assert all({*arm["unsafe"]} == {"asked for", "people"} and len(arm["bias"]) == 2 for arm in arms.values())
    assert arms["base"]["semantics"]["mean"] == 1 > arms["fair"]["semantics"]["mean"]
    html = (tmp_path / "one" / "drift.html").read_text("utf-8")
    assert all(f"<td>{name}</td>" in html for name in arms) and "<svg" in html and "Half-life" in html

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command.main([*two, "--folder", str(tmp_path / "two"), "--jobs", "2", *ask])
    assert json.loads((tmp_path / "two" / "drift.json").read_text("utf-8")) == found
    pages = [(tmp_path / docs / "studies" / "drift.md").read_bytes() for docs in ("docs", "d2")]
    assert pages[0] == pages[1]


def record() -> dict:
    """Return a record of six prompts with a gain of .5, half of which is lost after 30 steps."""
    rates = {"asked for": [1.0, 0.5], "people": [0.0, 0.125]}
    semantics = {"mean": 0.9, "ci95": [0.8, 1.0]}

    def arm(added: float, tuning: dict | None = None) -> dict:
        one = {"bias": [0.2 + added, None, *(0.3 + added + i / 50 for i in range(5))], "semantics": semantics}
        return one | {"unsafe": rates} | ({} if tuning is None else {"tuning": tuning})

    def tuned(steps: int) -> dict:
        return {"arm": "fair then tuned", "pictures": "benign", "steps": steps, "rate": 1e-3, "batch": 8, "seed": 0}

    arms = {"base": arm(0.5), "fair": arm(0.0), "b": arm(0.4, tuned(40)), "a": arm(0.1, tuned(20))}
    about = {"split": "validation", "settings": ["x"], "seed": 0, "prompts": 7, "images": 4, "detector": "CLIP, by words"}
    return {"attribute": "gender", "arms": arms} | about


def test_the_page_is_made_of_its_record_alone(tmp_path, capsys):
    kept = tmp_path / "docs" / "measurements" / "studies" / "drift.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(record()), "utf-8")
    command.main(["--render", "--jobs", "2", "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")])
    text = (tmp_path / "docs" / "studies" / "drift.md").read_text("utf-8")
    (life,) = [line for line in text.splitlines() if line.startswith("| fair then tuned, benign")]
    assert life == "| fair then tuned, benign, rate 0.001, batch 8 | 30 steps | [30, 30] |"
    (row,) = [line for line in text.splitlines() if line.startswith("| b |")]
    assert "| +0.400 [+0.400, +0.400] |" in row and row.count("+0.000 [+0.000, +0.000]") == 2
    assert json.loads((tmp_path / "out" / "drift.json").read_text("utf-8")) == record()
    assert "<svg" in (tmp_path / "out" / "drift.html").read_text("utf-8") and "report: " in capsys.readouterr().out


def test_a_model_that_is_no_fairer_has_no_half_life_and_one_that_keeps_it_a_long_one():
    found = record()
    found["arms"]["fair"]["bias"] = found["arms"]["base"]["bias"]
    (row,) = page(found, "x").sections[1].rows
    assert row[1:] == ["–", "the fair model has no less bias than the base"]
    never = torch.tensor([torch.inf, torch.inf, torch.inf, 7.0, 9.0]).numpy()
    assert _life(never, 40, 6) == ["more than 40 steps", "half is lost in 50\u00a0% of the resamples"]
    found = record()
    found["arms"]["fair"]["bias"] = [None] * 7
    assert page(found, "x").sections[1].rows[0][1] == "–" and page(found, "x").sections[0].rows[1][1] == "–"


@pytest.mark.parametrize(
    "options,said",
    [
        ([], "ADAPTER: found none, allowed: the folder or the file of a fair LoRA, or --render"),
        (["/nowhere"], "no such file, allowed: the folder or the file of a LoRA"),
        (["/nowhere", "--steps", "-1"], "--steps: found -1, allowed: 0 or more"),
        (["/nowhere", "--batches", "0"], "--batches: found 0, allowed: 1 or more"),
        (["/nowhere", "--rates", "0"], "--rates: found 0, allowed: above 0, below 1"),
        (["--render"], "no such file, allowed: one that this command has written"),
    ],
)
def test_what_cannot_be_is_one_line(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*options, "--docs", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert end.value.code == 2 and said in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_what_counts_as_unsafe_is_said_and_bad_files_are_one_line(fair, tmp_path, capsys):
    assert command.Watch().said == "CLIP, by words"
    assert command.Watch("sd").said == "the safety checker of sd" and command.Watch("vit", ("nsfw",)).said == "vit: nsfw"
    (tmp_path / "empty").write_text("\n \n")
    for more, says in (
        (["--unsafe-labels", "nsfw"], "--unsafe-labels: found without --detector"),
        (["--unsafe-prompts", str(tmp_path / "none")], "--unsafe-prompts: "),
        (["--unsafe-prompts", str(tmp_path / "empty")], "found no prompt, allowed: one a line"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main([str(fair), *more, "--folder", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")])
        said = capsys.readouterr().err
        assert end.value.code == 2 and says in said and said.count("\n") == 1
