"""fairdiff.load_adapter, fairdiff.audit and fairdiff.train say in plain diffusers what the commands say."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_adapters import KINDS, PROMPT, make, picture

import fairdiff
from fairdiff import library
from fairdiff.cli.compose import composed, overrides_of
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.catalogue import catalogue
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.plain import generator, view
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.solvers import make_solver
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.jobs import train_command
from fairdiff.portraits import weights

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"guidance_scale": 3.0, "num_inference_steps": 3}
PROMPTS = ["a photo of the face of a nurse, a person", "a photo of the face of a carpenter, a person"]
FEW = ["audit.images_per_prompt=8", "sampler.audit_steps=3"]


def pipeline(folder, **options) -> StableDiffusionPipeline:
    plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(folder, **plain, **options)


def saved(folder, tiny_folder, kind, seed=1, scale=1.0, **more):
    """An adapter folder as a run leaves it, and the image of the model with the adapter at a scale.

    more: of adapter.json, height, width and clip_skip, with which the image is made.
    """
    model = load_model(tiny_folder)
    model.scheduler = make_solver("ddim", model.scheduler.config, "zero", "trailing")
    model.size = (more["height"], more["width"]) if "height" in more else None
    model.clip_skip = more.get("clip_skip", 0)
    about = {"base_model": str(tiny_folder), "base_model_hash": model.fingerprint(precision=False)}
    about |= {"scheduler": "DDIMScheduler", "final_sigmas": "zero", "spacing": "trailing", "padding": "max_length"}
    about |= {"guidance": 3.0, "sampler_steps": 3, "negative_prompt": ""} | more
    adapter = make(model, kind, seed)
    folder.mkdir(parents=True)
    adapter.save(folder)
    write_json(folder / "adapter.json", about)
    adapter.rescale(scale)
    if not more:
        return picture(model, adapter)
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    return model.generator(3.0, 3, adapter.prefix)(PROMPT, noise)


def image(pipe, prefix="") -> torch.Tensor:
    return generator(pipe, OPTIONS, prefix)(PROMPT, initial_noise(PROMPT, 0, range(2), (4, 4, 4)))


def test_importing_is_quick():
    code = "import fairdiff, sys; assert not {'torch', 'diffusers', 'hydra'} & {*sys.modules}; print(fairdiff.audit)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "fairdiff" in found.stdout, found.stderr
    with pytest.raises(AttributeError, match="no nothing"):
        fairdiff.nothing  # noqa: B018


@pytest.mark.parametrize("kind,scale", [*((kind, 1.0) for kind in KINDS), ("lora_both", 0.4), ("soft_tokens", 0.4)])
def test_a_loaded_adapter_generates_what_it_was_trained_to_and_off_is_the_pipeline(tiny_folder, tmp_path, kind, scale):
    """No warning: the base model is the same, whatever solver the pipeline came with."""
    ours = saved(tmp_path / "run" / "adapter", tiny_folder, kind, scale=scale)
    pipe = pipeline(tiny_folder)
    adapter = fairdiff.load_adapter(pipe, tmp_path / "run", scale)
    assert len(repr(adapter)) < 200  # without the pipeline
    assert adapter.settings == OPTIONS and type(pipe.scheduler).__name__ == "DDIMScheduler"
    on = image(pipe, adapter.prefix)
    assert torch.allclose(on, ours, atol=1e-4)
    with adapter.off():
        assert adapter.prefix == ""
        off = image(pipe, adapter.prefix)
    frozen = load_model(tiny_folder)
    frozen.scheduler = pipe.scheduler
    assert torch.allclose(off, frozen.generator(3.0, 3)(PROMPT, initial_noise(PROMPT, 0, range(2), (4, 4, 4))), atol=1e-4)
    assert not torch.allclose(on, off, atol=1e-3) and torch.equal(on, image(pipe, adapter.prefix))


def test_size_and_clip_skip_of_the_training_are_settings_and_no_reason_to_warn(tiny_folder, tmp_path):
    """Of an audit too, which generates with them."""
    ours = saved(tmp_path / "a", tiny_folder, "lora_both", height=24, width=16, clip_skip=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = fairdiff.load_adapter(pipe := pipeline(tiny_folder), tmp_path / "a")
    assert adapter.settings == OPTIONS | {"height": 24, "width": 16, "clip_skip": 1}
    noise = initial_noise(PROMPT, 0, range(2), (4, 6, 4))
    assert torch.allclose(generator(pipe, adapter.settings)(PROMPT, noise), ours, atol=1e-4)
    assert not torch.allclose(generator(pipe, OPTIONS)(PROMPT, noise), ours, atol=1e-3)  # without the clip skip
    config, model = library._config(pipe, None, None, adapter, []), view(pipe)
    model.size = library.image_size(config.sampler, model)
    assert model.latent_shape == (4, 6, 4)
    after = library._generators(pipe, model, config, adapter)(3.0)["after"]
    assert torch.allclose(after(PROMPT, noise), ours, atol=1e-4)
    about = json.loads((tmp_path / "a" / "adapter.json").read_text())
    write_json(tmp_path / "a" / "adapter.json", about | {"width": None, "clip_skip": None})  # as written before
    (tmp_path / "a" / "adapter.json").rename(tmp_path / "adapter.json")
    (tmp_path / "a" / LORA_FILE).rename(tmp_path / LORA_FILE)
    with pytest.warns(UserWarning, match="configuration differ"):  # the other clip skip
        again = fairdiff.load_adapter(pipeline(tiny_folder), tmp_path)
    assert again.settings == OPTIONS | {"height": 24, "width": 16}


def test_two_adapters_are_both_on_and_each_is_switched_off_alone(tiny_folder, tmp_path):
    """LoRA of somebody else stays on, with the scale that it had, and diffusers' own order of loading does not matter."""
    for i, kind in enumerate(["lora_unet", "lora_both"]):
        saved(tmp_path / kind, tiny_folder, kind, seed=i)
        (tmp_path / kind / "adapter.json").unlink()  # its base is not compared: there is LoRA in the second already
    one, two = pipeline(tiny_folder), pipeline(tiny_folder)
    one.load_lora_weights(tmp_path / "lora_unet", adapter_name="theirs")
    one.set_adapters(["theirs"], [0.5])
    theirs = image(one)
    adapter = fairdiff.load_adapter(one, tmp_path / "lora_both", 0.7)
    with adapter.off():
        assert torch.allclose(image(one), theirs, atol=1e-6)
    for name, scale in (("lora_both", 0.7), ("lora_unet", 0.5)):
        fairdiff.load_adapter(two, tmp_path / name / LORA_FILE, scale)
    assert torch.allclose(image(one), image(two), atol=1e-5) and not torch.allclose(image(one), theirs, atol=1e-3)


def test_a_second_set_of_tokens_takes_another_name(tiny_folder, tmp_path):
    images = [saved(tmp_path / str(i), tiny_folder, "soft_tokens", seed=i) for i in range(2)]
    pipe = pipeline(tiny_folder)
    first = fairdiff.load_adapter(pipe, tmp_path / "0" / "adapter.json")
    with pytest.warns(UserWarning, match="tokenizer or configuration differ"):  # it has the first one's tokens
        second = fairdiff.load_adapter(pipe, tmp_path / "1")
    assert (first.prefix, second.prefix) == ("<fairdiff> ", "<fairdiff-2> ")
    for adapter, ours in zip((first, second), images, strict=True):
        assert torch.allclose(image(pipe, adapter.prefix), ours, atol=1e-4)


def test_another_base_model_is_a_warning(tiny_folder, tmp_path):
    saved(tmp_path / "a", tiny_folder, "lora_text")
    pipe = pipeline(tiny_folder)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias.add_(1)
    with pytest.warns(UserWarning, match=f"was trained on {tiny_folder}, and this pipeline's weights"):
        fairdiff.load_adapter(pipe, tmp_path / "a")
    half = pipeline(tiny_folder, dtype=torch.bfloat16)
    fairdiff.load_adapter(half, tmp_path / "a")  # the same folder by name, which is all that can be compared
    half.register_to_config(_name_or_path="elsewhere")
    with pytest.warns(UserWarning, match="bfloat16 and were not compared"):
        fairdiff.load_adapter(half, tmp_path / "a")


def part_of(folder, tmp_path, change) -> Path:
    state = load_file(folder / LORA_FILE)
    change(state)
    save_file(state, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_what_cannot_be_loaded_is_one_line(tiny_folder, tmp_path):
    saved(tmp_path / "a", tiny_folder, "lora_unet")
    pipe, before = pipeline(tiny_folder), None

    def refused(path, says, **options):
        with pytest.raises(FairDiffError, match=f"^load_adapter: .*{says}") as error:
            fairdiff.load_adapter(pipe, path, **options)
        assert "\n" not in str(error.value)

    before = image(pipe)
    refused(tmp_path / "nowhere", "nowhere, allowed: .*gender_unet")
    (tmp_path / "x.pth").touch()
    refused(tmp_path / "x.pth", "scripts/export.py")
    key = next(iter(load_file(tmp_path / "a" / LORA_FILE)))
    other = part_of(tmp_path / "a", tmp_path, lambda s: s.update({key.replace("unet.", "unet.nowhere."): s[key].clone()}))
    refused(other, r"some.safetensors: .*(fit|match)")
    half = part_of(tmp_path / "a", tmp_path, lambda s: s.update({k: v[:, :3].contiguous() for k, v in s.items()}))
    refused(half, "does not fit this pipeline")
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", r"holds 2 tensors \(a, b\); allowed: one")
    save_file({"<t>": torch.ones(2, 16)}, tmp_path / "tokens.safetensors")
    refused(tmp_path / "tokens.safetensors", "from which words", scale=0.5)
    assert torch.equal(image(pipe), before)


def test_textual_inversion_of_others(tiny_folder, tmp_path):
    save_file({"emb_params": torch.ones(2, 16)}, tmp_path / "style.safetensors")
    pipe = pipeline(tiny_folder)
    adapter = fairdiff.load_adapter(pipe, tmp_path / "style.safetensors")
    assert adapter.prefix == "<style> " and adapter.settings == {}
    assert not torch.allclose(image(pipe, adapter.prefix), image(pipe), atol=1e-3)


def test_the_catalogue_says_how_to_get_what_is_not_there(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "how_to" / "ship.md").read_text("utf-8")
    assert len(catalogue()) == 8
    for name, entry in catalogue().items():
        row = f"| `{name}` | {entry['target']} | {entry['prompts']} | {entry['kind']} | [{entry['experiment']}]"
        assert f"{row}({entry['hosted']}) |" in page, name
        with pytest.raises(FairDiffError, match=f"outputs/released/{name}: not there yet; .*{entry['hosted']}"):
            fairdiff.load_adapter(pipeline(tiny_folder), name)
    ours = saved(tmp_path / "outputs" / "released" / "race", tiny_folder, "lora_text")
    pipe = pipeline(tiny_folder)
    fairdiff.load_adapter(pipe, "race")
    assert torch.allclose(image(pipe), ours, atol=1e-4)


@pytest.mark.slow
def test_an_audit_of_the_embedded_pipeline_needs_no_option(tmp_path, capsys):
    """Its shares are those of the records, its prompts' bias is their gap, and the report stands alone."""
    pipe = StableDiffusionPipeline.from_pretrained(weights("model"))
    target = {"gender": {"male": 0.3, "female": 0.7}}  # in an order of its own
    result = fairdiff.audit(pipe, PROMPTS, target=target, settings=FEW)
    assert set(result.bias) == {"gender", "race", "age"} and len(result.records) == 16
    rows = result.records[result.records.found]
    for prompt in PROMPTS:
        of_prompt = rows[rows.prompt == prompt]
        share = float((of_prompt["p.gender.female"] > of_prompt["p.gender.male"]).mean())
        assert result.shares[prompt]["gender"] == pytest.approx({"female": share, "male": 1 - share})
    gaps = [abs(s["gender"]["female"] - s["gender"]["male"]) for s in result.shares.values()]
    assert result.bias["gender"] == pytest.approx(sum(gaps) / 2)
    assert f"The gender RMS distance is {result.distance['gender']:.2f} " in str(result)
    low, high = result.intervals["gender"]["distance"]
    assert low <= result.distance["gender"] <= high
    assert str(result).startswith("Female within 65.4 to 74.6\u00a0%, male within 25.4 to 34.6\u00a0%: ")
    page = result.report(tmp_path / "page.html").read_text("utf-8")
    assert PROMPTS[0] in page and "female 0.7" in page
    again = fairdiff.audit(pipe, PROMPTS, target=target, settings=[*FEW, "micro_batch=1"])
    assert again.shares == result.shares  # whatever the batch


@pytest.mark.slow
def test_an_audit_with_an_adapter_is_paired(tmp_path, tiny_folder):
    pipe = StableDiffusionPipeline.from_pretrained(weights("model"))
    adapter = make(load_model(weights("model")), "soft_tokens")
    adapter.save(tmp_path)
    loaded = fairdiff.load_adapter(pipe, tmp_path)
    result = fairdiff.audit(pipe, PROMPTS, adapter=loaded, settings=FEW)
    models = result.numbers["models"]
    assert list(models) == ["before", "after"] and result.numbers["paired"]["pairs"] == 16
    assert result.bias["gender"] == models["after"]["attributes"]["gender"]["bias"]["mean"]
    plain = fairdiff.audit(pipe, PROMPTS, settings=FEW)
    before = {p["prompt"]: p["counts"] for p in models["before"]["attributes"]["gender"]["per_prompt"]}
    alone = {p["prompt"]: p["counts"] for p in plain.numbers["models"]["before"]["attributes"]["gender"]["per_prompt"]}
    assert before == alone and models["after"]["dino"]["mean"] < 1


def test_what_cannot_be_audited_is_one_line():
    pipe = StableDiffusionPipeline.from_pretrained(weights("model"))
    for arguments, says in (
        ({"prompts": "a nurse"}, "^prompts: found 'a nurse'"),
        ({"prompts": []}, r"^prompts: found \[\]"),
        ({"prompts": PROMPTS, "target": {"gender": {"female": 0.9}}}, "^target.gender: no share for male"),
        ({"prompts": PROMPTS, "target": {"hat": {"with": 0.5, "without": 0.5}}}, "^audit.judge.path: .*hat"),
        ({"prompts": PROMPTS, "settings": ["audit.images=3"]}, "^audit.images: there is no such key"),
        ({"prompts": PROMPTS, "settings": "audit.images=3"}, "^settings: found the text"),
    ):
        with pytest.raises(FairDiffError, match=says):
            fairdiff.audit(pipe, **arguments)


SMALL = {
    "steps": 1, "global_batch": 8, "noise_pool": 8, "sampler": {"train_steps": [2, 2], "audit_steps": 2}, "cache": None,
    "audit": {"prompts": 2, "images_per_prompt": 4, "named": None, "without_people": 1}, "adapter": "soft_tokens",
}  # fmt: skip


@pytest.mark.slow
def test_training_returns_the_run_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fairdiff.train(SMALL)
    assert folder == composed(overrides_of(SMALL))[1] and folder.parts[:2] == ("outputs", "gender")
    about = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert about["type"] == "soft_tokens" and list(folder.glob("audits/*/report.html"))
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides_of(SMALL)])
    stamps = {p: p.stat().st_mtime_ns for p in Path("outputs").rglob("*") if p.is_file()}
    train_command()
    assert stamps == {p: p.stat().st_mtime_ns for p in Path("outputs").rglob("*") if p.is_file()}
    pipe = StableDiffusionPipeline.from_pretrained(weights("model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = fairdiff.load_adapter(pipe, folder)
    assert adapter.prefix == "<fairdiff> " and adapter.settings == {"guidance_scale": 1.5, "num_inference_steps": 2}


def test_settings_are_said_as_on_the_command_line():
    assert overrides_of(SMALL)[:5] == [
        "steps=1", "global_batch=8", "noise_pool=8", "sampler.train_steps=[2,2]", "sampler.audit_steps=2"
    ]  # fmt: skip
    odd = {"prompts": {"template": 'the "{}" of \\x'}, "adapter": "lora_text", "model.path": "/a b/null", "resume": True}
    config, folder = composed(overrides_of(odd))
    assert (config.prompts.template, config.model.path) == ('the "{}" of \\x', "/a b/null")
    assert folder == Path(folder) and overrides_of(["seed=1"]) == ["seed=1"]
    with pytest.raises(FairDiffError, match="^steps: found 0, allowed"):
        composed(["steps=0"])
    with pytest.raises(FairDiffError, match="^no_key: there is no such key"):
        composed(["no_key=0"])


@pytest.mark.parametrize(
    "settings,says",
    [
        (["attribute=[gender,gender]"], "attribute: found gender 2 times"),
        (["adapter=lora_text", "adapter=lora_unet"], "adapter: found adapter=lora_text and adapter=lora_unet"),
        (["adapter.tokens=3"], "adapter.tokens: found with adapter.type=lora"),
        ({"adapter": "soft_tokens", "adapter.rank": 3}, "adapter.rank: found with adapter.type=soft_tokens"),
        (["+hydra.foo=1"], "hydra.foo: there is no such key"),
    ],
)
def test_what_the_command_line_refuses_python_refuses(settings, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairDiffError, match=re.escape(says)):
        fairdiff.train(settings)
    assert not list(tmp_path.iterdir())
