"""Properties of the frozen model: how prompts are padded and encoded, and what its fingerprint depends on."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from tiny import composed, with_json, with_scheduler, with_tensors
from torch import nn
from transformers import CLIPTokenizer

from fairdiff import builder, fingerprint
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.solvers import make_solver, solver_coefficients
from fairdiff.errors import FairDiffError

PROMPT = "a photo of the face of a nurse"


def test_the_empty_prompt_is_padded_to_the_prompts_length_with_its_mask(tiny_folder):
    model = load_model(tiny_folder, padding="longest")
    cond, uncond = model.encode_pair(PROMPT)
    assert cond.shape == uncond.shape and cond.shape[1] < model.tokenizer.model_max_length
    assert torch.allclose(uncond[:, :2], model.encode(""), atol=1e-5)  # causal: its own two tokens see no padding


@pytest.mark.parametrize("negative", ["a chef", "a chef, a carpenter, a woman, a man"])
@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_a_negative_prompt_takes_the_empty_ones_place(tiny_folder, padding, negative):
    model = load_model(tiny_folder, padding=padding)
    prompt, noise = "a nurse", initial_noise("a nurse", 0, [0], model.latent_shape)
    key, plain = model.fingerprint(), model.generator(3.0, 3)(prompt, noise)
    model.negative = negative
    cond, uncond = model.encode_pair(prompt)
    assert cond.shape == uncond.shape and model.fingerprint() != key
    generated = model.generator(3.0, 3)(prompt, noise)
    assert not torch.allclose(plain, generated, atol=1e-4)
    if padding == "max_length":
        pipeline = StableDiffusionPipeline.from_pretrained(
            tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            prompt, negative_prompt=negative, guidance_scale=3.0, num_inference_steps=3, latents=noise,
            output_type="pt",
        ).images  # fmt: skip
        assert torch.allclose(generated, theirs, atol=1e-4)


def test_a_hash_of_tensors_copies_none():
    tensors = [torch.arange(2**20, dtype=torch.float32), torch.ones(3, 5).T, torch.tensor(1.5), torch.zeros(0)]
    tensors.append(torch.ones(7, dtype=torch.bfloat16))
    wanted = hashlib.sha256(b"".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()
    tracemalloc.start()
    found = fingerprint.of_tensors(tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert wanted.startswith(found) and peak < 2**20  # the first tensor has four times as many bytes


def test_the_fingerprint_knows_the_model_and_not_where_it_lies_or_who_asks(tiny_folder, tmp_path):
    """diffusers records the default values in an order that changes between processes."""
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    here, there = load_model(tiny_folder), load_model(moved)
    assert here.fingerprint() == there.fingerprint()
    for kind in ("euler", "unipc"):
        solver = make_solver(kind, here.scheduler.config, "zero", "linspace")
        noted = solver.config["_use_default_values"]
        assert len(noted) > 1
        here.scheduler, key = solver, here.fingerprint()
        there.scheduler = make_solver(kind, here.scheduler.config, "zero", "linspace")
        solver._internal_dict = type(solver.config)(dict(solver.config) | {"_use_default_values": noted[::-1]})
        assert there.fingerprint() == here.fingerprint() != key
        there.scheduler = make_solver(kind, dict(there.scheduler.config) | {"beta_end": 0.02}, "zero", "linspace")
        assert there.fingerprint() != here.fingerprint()


def test_the_fingerprint_knows_what_a_tokenizer_makes_of_a_text_and_not_what_was_asked_of_it(tiny_folder, tmp_path):
    """Without a mask, the padding of a prompt affects the images."""
    model, key = load_model(tiny_folder), load_model(tiny_folder).fingerprint()
    model.encode_pair(PROMPT)
    model.overlong("", [PROMPT] * 2)  # padding and truncation are set by calls
    assert model.fingerprint() == key
    folder = shutil.copytree(tiny_folder, tmp_path / "padded")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = "!" if "!" in tokenizer.get_vocab() else tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(folder / "tokenizer")
    other, noise = load_model(folder), initial_noise(PROMPT, 0, range(1), model.latent_shape)
    assert not torch.equal(*(m.generator(3.0, 3)(PROMPT, noise) for m in (model, other)))
    assert other.fingerprint() != key


def refused(folder, says, caplog):
    """Check that loading fails with one line that has these words, and that no library logs anything."""
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        with pytest.raises(FairDiffError, match=says) as caught:
            load_model(folder)
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and not caplog.records


DAMAGES = {
    "missing": (lambda state, key: state.pop(key), r"1 missing \({name}\)"),
    "unexpected": (lambda state, key: state.update({"layer.new": torch.zeros(3)}), r"1 unexpected \(layer\.new\)"),
    "misshapen": (
        lambda state, key: state.update({key: torch.zeros(5, 7)}),
        r"1 misshapen \({name}: \[5, 7\] for \[.*\]\)",
    ),
    "none": (lambda state, key: state.clear(), r"\d\d+ missing \(\w.*, \.\.\.\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_a_file_without_all_its_tensors_is_refused_by_their_names(component, damage, tiny_folder, tmp_path, caplog):
    """The libraries initialise missing tensors at random and only warn."""
    key = {"text_encoder": "encoder.layers.0.mlp.fc1.weight", "unet": "conv_in.weight", "vae": "decoder.conv_in.weight"}
    change, says = DAMAGES[damage]
    folder = with_tensors(tiny_folder, tmp_path / "model", component, lambda state: change(state, key[component]))
    name = key[component].replace(".", r"\.")
    refused(folder, f"^model.path: .*: the tensors of {component}: {says.format(name=name)}; allowed: exactly", caplog)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_a_component_without_a_file_is_one_line_and_the_only_one(component, tiny_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    next((folder / component).glob("*.safetensors")).unlink()
    refused(folder, "^model.path: cannot load .* no file named", caplog)


@pytest.mark.parametrize("found", [["diffusers", "AutoencoderTiny"], [None, None], None])
def test_a_component_of_another_class_is_refused(found, tiny_folder, tmp_path, caplog):
    folder = with_json(tiny_folder, tmp_path / "model", "model_index.json", vae=found)
    name = found and found[1]
    refused(folder, f"its model_index.json has {name} for vae, allowed: AutoencoderKL", caplog)


def test_weights_are_checked_and_hashed_before_their_precision_is_lowered_and_that_before_they_are_moved(
    tiny_folder, monkeypatch
):
    """The model goes to the meta device, where reading the weights would fail."""
    moved, move = [], nn.Module.to

    def to(module, *where):
        if where == ("meta",):
            moved.extend((type(module).__name__, p.dtype) for p in module.parameters())
        return move(module, *where)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(builder.model, "check_device", lambda name: None)
    options = [f"model.path={tiny_folder}", "model.dtype=bfloat16"]
    there, here = (builder.build_model(composed(*options, f"model.device={name}")) for name in ("meta", "cpu"))
    assert there.weights_fingerprint == here.weights_fingerprint and there.unet.device.type == "meta"
    wanted = {("UNet2DConditionModel", torch.bfloat16), ("AutoencoderKL", torch.bfloat16), ("CLIPTextModel", torch.float32)}
    assert set(moved) == wanted


def test_a_folder_with_weights_in_half_precision_only_is_read(tiny_folder, tmp_path):
    """The files have the names of `save_pretrained(variant="fp16")`, for one component or all."""
    expected = load_model(tiny_folder)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for component in ("unet", "vae", "text_encoder"):
        (file,) = (folder / component).glob("*.safetensors")
        state = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(state, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
        model = load_model(folder)
        for name, tensor in getattr(model, component).state_dict().items():
            wanted = getattr(expected, component).state_dict()[name]
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted.half().float())


def test_the_old_name_of_stable_diffusion_is_known(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FairDiffError, match="cannot load stable-diffusion-v1-5/stable-diffusion-v1-5@main"):
        load_model("runwayml/stable-diffusion-v1-5@main")
    assert "runwayml/stable-diffusion-v1-5 is stable-diffusion-v1-5/stable-diffusion-v1-5 now" in capsys.readouterr().out


def test_a_size_written_twice_is_the_size(tiny_folder, tmp_path):
    twice = load_model(with_json(tiny_folder, tmp_path / "model", "unet/config.json", sample_size=[4, 4]))
    one, noise = load_model(tiny_folder), initial_noise(PROMPT, 0, [0], (4, 4, 4))
    assert twice.latent_shape == one.latent_shape == (4, 4, 4)
    assert torch.equal(*(m.generator(3.0, 2)(PROMPT, noise) for m in (one, twice)))


@pytest.mark.parametrize("size", [[4, 8], [4], 0, "4", None, 4.5])
def test_a_size_of_no_square_is_refused(size, tiny_folder, tmp_path, caplog):
    folder = with_json(tiny_folder, tmp_path / "model", "unet/config.json", sample_size=size)
    refused(folder, "the sample_size of its latents is .*, which is no square's", caplog)


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan"), "1"])
def test_a_scaling_factor_that_is_none_is_refused(factor, tiny_folder, tmp_path, caplog):
    folder = with_json(tiny_folder, tmp_path / "model", "vae/config.json", scaling_factor=factor)
    refused(folder, "scaling_factor|cannot load", caplog)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "scheduler,says",
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler names no beta_schedule, .* epsilon"),
        (
            DPMSolverMultistepScheduler(**BETAS, use_flow_sigmas=True),
            "use_flow_sigmas, .* does not go together .* epsilon",
        ),
        (
            DDPMScheduler(**BETAS, rescale_betas_zero_snr=True),
            "rescale_betas_zero_snr, .* does not go together with a U-Net that predicts epsilon",
        ),
        (
            DDPMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            "rescale_betas_zero_snr, noise without any image at the first step, which no solver here starts from",
        ),
    ],
)
def test_a_scheduler_that_its_unet_was_not_trained_with_is_refused(scheduler, says, tiny_folder, tmp_path, caplog):
    refused(
        with_scheduler(tiny_folder, tmp_path / "model", scheduler), f"^model.path: .*its scheduler .*{says}", caplog
    )


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"beta_end": 5.0}, "end at (nan|inf) times as much noise as image, allowed: 1 to 1000"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "end at 2.029e.04 times as much noise as image"),
        ({"num_train_timesteps": 50}, "end at 0.556. times as much noise as image"),
        ({"beta_schedule": "magic"}, "magic is not implemented"),
        ({"beta_end": "x"}, "unsupported operand"),
        (
            {"thresholding": True},
            "thresholding is on, .* allowed: thresholding false in the model's scheduler_config.json",
        ),
        ({"prediction_type": "sample"}, "prediction_type is sample, allowed: epsilon, v_prediction"),
        (
            {"lower_order_final": False, "_class_name": "UniPCMultistepScheduler"},
            "of 4 steps are not finite|of 8 steps",
        ),
    ],
)
def test_a_schedule_that_cannot_be_sampled_on_is_refused_before_anything_is_sampled(
    changes, says, tiny_folder, tmp_path
):
    folder = with_json(tiny_folder, tmp_path / "model", "scheduler/scheduler_config.json", **changes)
    kind = "unipc" if "_class_name" in changes else "dpm"
    with pytest.raises(FairDiffError, match=f"^model.path: .*(scheduler|load).*{says}") as caught:
        builder.build_model(composed(f"model.path={folder}", f"sampler.scheduler={kind}"))
    assert "\n" not in str(caught.value)


SCHEDULERS = [  # what folders hold, with options of their own
    DDIMScheduler(**BETAS, clip_sample=False),
    PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=True),  # where the betas end, which DDIM takes over
    LMSDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    EulerAncestralDiscreteScheduler(**BETAS),
    UniPCMultistepScheduler(**BETAS, use_exponential_sigmas=True),
    DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", None])
@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc"])
def test_any_scheduler_of_a_folder_is_replaced_by_the_solver_on_the_same_betas(kind, predicts):
    """None: an old folder that does not name the prediction type, which is then noise."""
    wanted = make_solver(kind, DDPMScheduler(**BETAS).config, "zero", "linspace")
    for scheduler in SCHEDULERS:
        said = {k: v for k, v in scheduler.config.items() if k != "prediction_type" and not k.startswith("_")}
        own = type(scheduler).from_config(said | ({"prediction_type": predicts} if predicts else {}))
        solver = make_solver(kind, own.config, "zero", "linspace")
        assert solver.config.prediction_type == (predicts or "epsilon")
        assert torch.equal(solver.alphas_cumprod, wanted.alphas_cumprod)
        solver.set_timesteps(9)
        wanted.set_timesteps(9)
        assert torch.equal(solver.timesteps, wanted.timesteps)
        if predicts != "v_prediction":
            assert torch.equal(solver_coefficients(solver, 5), solver_coefficients(wanted, 5))


OFFLINE = """
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError

for name in ("some/model", "some/model@second", "some/model@third", "some/half", "some/none"):
    try:
        unet = (model := load_model(name)).unet
        print(name, float(unet.conv_in.bias[0]), float(unet.conv_in.weight.sum()), unet.dtype, model.text_encoder.dtype)
    except FairDiffError as error:
        print(name, error)
"""


@pytest.fixture(scope="module")
def offline(tiny_folder, tmp_path_factory) -> list[str]:
    """What a process says that may not download and has a cache as the hub's library keeps it.

    Of one model there are two revisions with other weights. "half" has two components in half precision only, "none" lacks
    them.
    """
    hub, main = tmp_path_factory.mktemp("hub"), {"main": "a" * 40}
    for name, revisions in (("model", main | {"second": "b" * 40}), ("half", main), ("none", main)):
        root = hub / f"models--some--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "snapshots").mkdir()
        for factor, (revision, commit) in enumerate(revisions.items(), 1):
            (root / "refs" / revision).write_text(commit)

            def change(state, factor=factor):
                state["conv_in.bias"] = torch.full_like(state["conv_in.bias"], factor)

            with_tensors(tiny_folder, root / "snapshots" / commit, "unet", change)
    for name in ("half", "none"):
        for component in ("unet", "text_encoder"):
            (file,) = (hub / f"models--some--{name}" / "snapshots" / ("a" * 40) / component).glob("*.safetensors")
            if name == "half":
                state = {key: tensor.half() for key, tensor in load_file(file).items()}
                save_file(state, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
            file.unlink()
    env = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_revision_of_a_hub_model_is_read(offline):
    assert [line.split()[:2] for line in offline[:2]] == [["some/model", "1.0"], ["some/model@second", "2.0"]]
    assert offline[2].startswith("some/model@third model.path: cannot load some/model@third")


def test_a_hub_model_that_has_its_weights_in_half_precision_only_is_read(offline, tiny_folder):
    """Any component may have half-precision weights only; one without weights is refused."""
    expected = load_model(tiny_folder)
    *warned, line, refused = offline[3:]
    said = line.split()
    assert said[0] == "some/half" and said[3:] == ["torch.float32"] * 2
    assert [text.split(" is")[0] for text in warned] == [
        f"warning: model.path: the {component} of some/half" for component in ("text_encoder", "unet")
    ]
    assert float(said[2]) == pytest.approx(float(expected.unet.conv_in.weight.half().float().sum()))
    assert refused.startswith("some/none model.path: cannot load some/none")


@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc"])
def test_options_of_the_folders_own_scheduler_that_the_chosen_solver_has_not_change_nothing(
    kind, tiny_folder, tmp_path
):
    """DDPM clips by default, and diffusers keeps the key beside the solver's own."""
    folder = with_scheduler(tiny_folder, tmp_path / "ddpm", DDPMScheduler(**BETAS, clip_sample=True))
    options = [f"sampler.scheduler={kind}", "sampler.spacing=trailing"]
    models = [builder.build_model(composed(f"model.path={path}", *options)) for path in (tiny_folder, folder)]
    assert torch.equal(*(solver_coefficients(model.scheduler, 5) for model in models))


@pytest.mark.parametrize("name", ["portraits", "sd15"])
def test_steps_are_spread_as_the_sampler_says_and_not_as_the_folder_does(name, tiny_folder, tmp_path):
    """Stable Diffusion 1.5's folder says nothing, one that a recent diffusers has written again says "leading"."""
    old = with_scheduler(tiny_folder, tmp_path / "old", PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1))
    file = old / "scheduler/scheduler_config.json"
    said = json.loads(file.read_text())
    assert said.pop("timestep_spacing") == "leading"
    new = shutil.copytree(old, tmp_path / "new")
    file.write_text(json.dumps(said))
    options = [f"model={name}", "model.device=cpu", "model.dtype=float32"]
    found = []
    for path, more in ((old, []), (new, []), (new, ["sampler.spacing=leading"])):
        model = builder.build_model(composed(*options, f"model.path={path}", *more))
        noise = initial_noise(PROMPT, 0, [0], model.latent_shape)
        model.scheduler.set_timesteps(21)
        found.append((int(model.scheduler.timesteps[0]), model.generator(3.0, 4)(PROMPT, noise)))
    assert [first for first, _ in found] == [999, 999, 946]
    assert torch.equal(found[0][1], found[1][1]) and not torch.allclose(found[1][1], found[2][1], atol=1e-3)
