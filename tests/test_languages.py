"""Other languages: the lists, their noise, the reference text, and a page that does not call an ignored prompt fair."""

import json
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from tiny import composed
from tiny_judges import audit_settings

from fairdiff.audit.records import load_records
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.portraits import occupations
from fairdiff.prompts import Prompt, read_prompts
from fairdiff.studies import languages

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import languages as command  # noqa: E402
from harness.languages_page import LEFT_OUT, REFERENCE, SAME, page  # noqa: E402

FILES = sorted(languages.FOLDER.glob("*.csv"))
TWO_FORMS = {"german", "spanish", "french", "italian"}
NURSE, CHEF = (Prompt(f"a photo of the face of a {s}, a person", "occupation", s) for s in ("nurse", "chef"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_list_has_every_test_occupation_once_and_serves_any_audit(file):
    words = languages.read_words(file)
    english = languages.read_words(languages.FOLDER / "english.csv")
    assert list(words.texts) == list(english.texts) and len(words.texts) >= 40
    assert all(occupations.split(name) == "test" and name in occupations.OCCUPATIONS for name in words.texts)
    assert words.forms == (file.stem in TWO_FORMS)
    texts = [*words.texts.values(), *languages.read_words(file, both_forms=True).texts.values()]
    assert all(text == normalize("NFC", text) and "{" not in text for text in texts)
    prompts = read_prompts(file, "a photo of the face of {a} {}, a person")
    assert len(prompts) == len(words.texts) and all(p.people for p in prompts)
    if file.stem != "english":
        assert [p.text for p in prompts] == list(words.texts.values())


def test_there_are_five_languages_and_every_file_is_described():
    assert len(FILES) >= 6
    about = (languages.FOLDER / "README.md").read_text("utf-8")
    assert all(file.stem.capitalize() in about for file in FILES) and "Apache-2.0" in about


def test_words_are_filled_in_and_both_forms_stand_where_there_are_two(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('english,subject,feminine,template\nnurse,Pfleger,Pflegerin,"Beruf: {}"\nchef,Koch,,\n', "utf-8")
    assert languages.read_words(file).texts == {"nurse": "Beruf: Pfleger", "chef": languages.SAME_WORDS.format("Koch")}
    assert languages.read_words(file, both_forms=True).texts["nurse"] == "Beruf: Pflegerin / Pfleger"
    rewrite = languages.translated([NURSE, Prompt("a photo of a tree", "object", "tree", False)], languages.read_words(file))
    assert rewrite(NURSE.text, torch.zeros(2, 1)) == ["Beruf: Pfleger"] * 2
    assert rewrite("a photo of a tree", torch.zeros(1, 1)) == ["a photo of a tree"]
    nobody = languages.left_out([NURSE], "a photo of the face of {a} {}")
    assert nobody(NURSE.text, torch.zeros(1, 1)) == ["a photo of the face of a person"]


@pytest.mark.parametrize(
    "text,said",
    [
        ("subject\nx\n", "has no column english"),
        ("english,subject\nnurse,\n", "line 2: the cell subject is empty"),
        ("english,subject\na,x\nb,x\n", "line 3: b or its prompt 'a photo of the face of a person, occupation: x' stands"),
    ],
)
def test_a_list_that_cannot_be_is_refused(text, said, tmp_path):
    (tmp_path / "x.csv").write_text(text, "utf-8")
    with pytest.raises(FairDiffError, match=said):
        languages.read_words(tmp_path / "x.csv")


def test_a_prompt_without_a_translation_is_refused():
    with pytest.raises(FairDiffError, match="found chef without a translation, allowed: nurse"):
        languages.translated([NURSE, CHEF], languages.Words({"nurse": "x"}, False))


def scores(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.2, 0.01, 40)


def test_english_keeps_all_of_the_occupation_ignoring_it_nothing_and_a_mixture_its_share():
    none, noise = scores(0), 0.2 * scores(2)
    english = none + 0.1 + noise
    assert languages.kept(english, none, english) == (pytest.approx(1), (pytest.approx(1), pytest.approx(1)))
    assert languages.kept(none, none, english)[0] == pytest.approx(0)
    value, (low, high) = languages.kept(none + 0.3 * (english - none) + scores(3) - 0.2, none, english)
    assert low < 0.3 < high and low < value < high and high - low < 0.2
    assert languages.kept(english, none, none + scores(4) - scores(5)) is None  # English itself shows nothing


LESS, MORE, SAME_BIAS = (-0.3, -0.1), (0.1, 0.3), (-0.1, 0.1)


@pytest.mark.parametrize(
    "kept,change,said",
    [
        ((0.1, (0.0, 0.2)), LESS, "ignored the prompt, and is less biased for that"),
        ((0.1, (0.0, 0.2)), MORE, "ignored the prompt"),
        ((0.9, (0.8, 1.0)), LESS, "read the prompt; less biased than in English"),
        ((0.9, (0.8, 1.0)), MORE, "read the prompt; more biased than in English"),
        ((0.9, (0.8, 1.0)), (np.nan, np.nan), "read the prompt; no clear change of bias"),
        ((0.5, (0.2, 0.8)), LESS, "cannot tell whether it read the prompt"),
        ((0.5, (np.nan, np.nan)), LESS, "cannot tell whether it read the prompt"),
        (None, LESS, "cannot tell: in English the pictures show no occupation clearly either"),
    ],
)
def test_less_bias_is_fair_only_where_the_prompt_was_read(kept, change, said):
    assert languages.reading(kept, change) == said


def row(bias: float, clip_t: np.ndarray) -> dict:
    biases = [None, *(bias + 0.01 * (i % 5) for i in range(39))]
    return {
        "bias": {"gender": {"values": biases, "floor": 0.1}}, "clip_t": clip_t.tolist(),
        "no_face": {"rate": 0.05, "ci95": [0.02, 0.1], "images": 6},
    }  # fmt: skip


def record() -> dict:
    none = scores(0)
    english = none + 0.1
    rows = {
        REFERENCE: row(0.6, english), LEFT_OUT: row(0.1, none), SAME: row(0.6, english - 0.001 * scores(1)),
        "german": row(0.2, none + 0.002 * scores(1)), "french": row(0.3, none + 0.09 + 0.01 * scores(3)),
    }  # fmt: skip
    adapted = rows | {"german": row(0.2, none), "french": row(0.2, none + 0.09 + 0.01 * scores(3))}
    about = {"settings": ["x"], "adapter": "a", "prompts": 40, "images": 8, "model": "m", "target": "t"}
    return {"parts": {"without an adapter": rows, "with the adapter": adapted}} | about


def test_the_page_says_ignored_where_clip_t_falls_with_the_bias():
    _, without, adapted, reach = page(record(), "x").sections
    said = {line[0]: line[-1] for line in without.rows}
    assert said["German"] == "ignored the prompt, and is less biased for that"
    assert said["French"] == "read the prompt; less biased than in English"
    assert said[SAME] == "read the prompt; no clear change of bias" and said[REFERENCE] == said[LEFT_OUT] == "–"
    assert without.text[1] == "Ignored the prompt: German. Their bias says nothing about fairness."
    lines = {line[0]: line for line in reach.rows}
    assert lines["French"][3] == "−0.100 [−0.100, −0.100]" and lines["German"][3].startswith("+0.000")
    assert lines["German"][5] == "ignored the prompt" and lines["French"][5] == "read the prompt"
    kept = {line[0]: line[5] for line in without.rows}
    assert kept[REFERENCE] == "100\u00a0%" and kept[LEFT_OUT].startswith("0.0\u00a0%")


def test_the_page_is_made_of_its_record_alone(tmp_path, capsys):
    kept = tmp_path / "docs" / "measurements" / "studies" / "languages.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(record()), "utf-8")
    command.main(["--render", "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")])
    text = (tmp_path / "docs" / "studies" / "languages.md").read_text("utf-8")
    assert "`python scripts/languages.py --adapter a`" in text and text.count("| German |") == 3
    assert json.loads((tmp_path / "out" / "languages.json").read_text("utf-8")) == record()
    assert "<svg" in (tmp_path / "out" / "languages.html").read_text("utf-8") and "report: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,said",
    [
        (["--languages", "klingon"], "--languages: found klingon, allowed: french, german, indonesian, italian, spanish"),
        (["--adapter", "/nowhere"], "no such file, allowed: the folder or the file of an adapter"),
        (["--render"], "no such file, allowed: one that this command has written"),
        (["--translations", "/nowhere"], "english.csv"),
    ],
)
def test_what_cannot_be_is_one_line(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*options, "--docs", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert end.value.code == 2 and said in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory) -> Path:
    """A LoRA of both parts that changes images."""
    adapter, draw = Lora(load_model(tiny_folder), ["text_encoder", "unet"], 2, 2, torch.Generator()), torch.Generator()
    for parameter in adapter.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw.manual_seed(parameter.numel())))
    adapter.save(folder := tmp_path_factory.mktemp("lora"))
    return folder


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("languages")
    return audit_settings(tiny_folder, folder)


@pytest.mark.slow
def test_a_language_has_the_noise_of_the_english_prompt_with_and_without_an_adapter(tiny_folder, lora, settings, tmp_path):
    from harness.methods import adapter, reworded

    words, english = languages.Words({"nurse": "ein Pfleger"}, False), "a photo of the face of a nurse"
    noise = initial_noise(english, 0, range(2), load_model(tiny_folder).latent_shape)
    config = composed(*settings)
    found = {}
    for name, own in (("plain", None), ("adapted", adapter("x", lora))):
        method = reworded(name, (), lambda config, plan: languages.translated([Prompt(english, "o", "nurse")], words), own)
        at = method.begin(config, make_plan(config), load_model(tiny_folder), tmp_path)(config.sampler.guidance)
        found[name] = {model: generate(english, noise) for model, generate in at.items()}
    plain = load_model(tiny_folder).generator(config.sampler.guidance, 2)
    assert torch.equal(found["plain"]["before"], plain(english, noise))
    assert torch.equal(found["plain"]["after"], plain("ein Pfleger", noise))
    assert torch.equal(found["adapted"]["before"], plain(english, noise))
    assert not torch.allclose(found["adapted"]["after"], plain("ein Pfleger", noise), atol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_goes_on_and_measures_every_language_against_the_english_text(
    lora, settings, tmp_path, monkeypatch, capfd
):
    ask = ["--adapter", str(lora), "--languages", "german", "turkish", "--both-forms", "--set", *settings]
    ask += ["--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")]
    calls, audited = [], command.audited

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return audited(*args)

    monkeypatch.setattr(command, "audited", interrupt)
    with pytest.raises(SystemExit) as end:
        command.main(ask)
    assert end.value.code == 130 and "the same command goes on" in capfd.readouterr().err
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("report.html")}
    assert len(done) == 2
    command.main(ask)
    assert done.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("report.html")}.items()

    found = json.loads((tmp_path / "docs" / "measurements" / "studies" / "languages.json").read_text("utf-8"))
    names = [REFERENCE, LEFT_OUT, SAME, "german", "german, both forms", "turkish"]
    without, adapted = found["parts"].values()
    assert list(without) == names and list(adapted) == names
    assert all(len(one["clip_t"]) == len(one["bias"]["gender"]["values"]) == 2 for one in without.values())
    assert without[REFERENCE]["clip_t"] != adapted[REFERENCE]["clip_t"] != adapted["german"]["clip_t"]
    assert not any(str(ROOT) in text for text in found["settings"])
    for path in (tmp_path / "out").rglob("records.parquet"):
        records = load_records(path)
        people = records[records.people]
        assert all("the face of" in text for text in people.prompt)  # CLIP-T is of the English text
        before = people[people.model == "before"].sort_values(["prompt", "image_index"]).clip_t
        assert before.groupby(people.prompt).mean().tolist() == pytest.approx(without[REFERENCE]["clip_t"], abs=1e-6)
    html = (tmp_path / "out" / "languages.html").read_text("utf-8")
    assert "does the adapter reach other languages?" in html and html.count("<td>Turkish</td>") == 3
