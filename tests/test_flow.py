"""Flow-matching transformers, Stable Diffusion 3 and FLUX, by the same code: held against diffusers' own pipelines."""

import json
import math
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from test_main_job import BESIDE_EMBEDDED, launch
from test_sampling import factorised, literal
from tiny import composed, make_trainee, with_json, with_scheduler, with_tensors
from tiny_flow import flux, sd3, sd3_without_t5
from tiny_judges import uncalibrated

from fairdiff import builder
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.denoise import call_unet, image_tokens, split_row, with_row
from fairdiff.diffusion.export import export
from fairdiff.diffusion.imports import import_lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.solvers import gradient_weights, make_solver, solver_coefficients
from fairdiff.diffusion.t5 import T5_TOKENS
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse"
PARTS = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}
KINDS = {
    "sd3": StableDiffusion3Pipeline, "without_t5": StableDiffusion3Pipeline, "flux": FluxPipeline, "schnell": FluxPipeline,
}  # fmt: skip
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # which plain diffusers wants to be told
MODES = ["unit", "reference", "solver"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    return {
        "sd3": sd3(made["sd3"]), "without_t5": sd3_without_t5(made["without_t5"]), "flux": flux(made["flux"]),
        "schnell": flux(made["schnell"], dev=False),
    }  # fmt: skip


def plain(name, folder):
    pipeline = KINDS[name].from_pretrained(folder, **(NO_T5 if name == "without_t5" else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, noise, guidance, **more):
    """Generate in plain diffusers from the same noise, which is packed for FLUX's pipeline."""
    if isinstance(pipeline, FluxPipeline):
        noise, more = FluxPipeline._pack_latents(noise, *noise.shape), more | {"height": 16, "width": 16}
    return pipeline(
        [PROMPT] * len(noise), guidance_scale=guidance, num_inference_steps=3, latents=noise, output_type="pt", **more
    ).images  # fmt: skip


def noise_of(model, indices=(0, 1)):
    return initial_noise(PROMPT, 0, indices, model.latent_shape)


def lora(model, kind, perturb=True):
    generator = torch.Generator().manual_seed(1)
    adapter = Lora(model, PARTS[kind], 4, 8, generator)
    for p in adapter.parameters() if perturb else ():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def reached(module: str, name: str) -> bool:
    """Return whether images depend on a factor; the text queries of the last block of Stable Diffusion 3 are not used."""
    return not (module == "transformer" and name.startswith("transformer_blocks.1.attn.add_q_proj"))


@pytest.mark.parametrize("name,guidance", [("sd3", 0.0), ("sd3", 3.0), ("without_t5", 3.0), ("flux", 1.0),
                                           ("flux", 3.5), ("schnell", 0.0)])  # fmt: skip
def test_pictures_are_those_of_the_plain_pipeline(folders, name, guidance):
    model = load_model(folders[name])
    theirs = generate(plain(name, folders[name]), noise_of(model), guidance)
    assert theirs.shape == (2, 3, 16, 16) and theirs.std() > 0.01
    assert torch.allclose(model.generator(guidance, 3)(PROMPT, noise_of(model)), theirs, atol=1e-4)
    assert not torch.allclose(model.generator(guidance, 3)("a chef", noise_of(model)), theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "without_t5"])
def test_embeddings_are_the_plain_pipelines_to_the_bit(folders, name):
    """Without T5, zeros replace its embeddings after those of the CLIP encoders."""
    model, pipeline = load_model(folders[name]), plain(name, folders[name])
    with torch.no_grad():
        ours = split_row(model.encode(PROMPT))
        words, _, pooled, _ = pipeline.encode_prompt(PROMPT, PROMPT, PROMPT, do_classifier_free_guidance=False)
    assert torch.equal(ours[0], words) and torch.equal(ours[1][:, : pooled.shape[1]], pooled)
    assert ours[0][:, -T5_TOKENS[StableDiffusion3Pipeline] :].any() == (name == "sd3")
    assert not ours[1][:, pooled.shape[1] :].any()


def test_without_t5_a_prompt_is_as_long_as_clip_reads(folders):
    whole, less = (load_model(folders[name]) for name in ("sd3", "without_t5"))
    assert (whole.most_tokens, less.most_tokens) == (256, less.tokenizer.model_max_length)
    long = f"{PROMPT} " * 20
    assert less.overlong("", [long, PROMPT]) == [long] and not whole.overlong("", [long])
    assert whole.weights_fingerprint != less.weights_fingerprint and whole.multiple == less.multiple == 8


def test_a_negative_prompt_and_a_shift_by_size_are_the_pipelines_too(folders, tmp_path):
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=9)
    folder = with_scheduler(folders["sd3"], tmp_path / "model", dynamic)
    model = load_model(folder)
    model.negative = "a woman"
    theirs = generate(plain("sd3", folder), noise_of(model), 3.0, negative_prompt=["a woman"] * 2)
    assert torch.allclose(model.generator(3.0, 3)(PROMPT, noise_of(model)), theirs, atol=1e-4)
    model.scheduler = load_model(folders["sd3"]).scheduler
    assert not torch.allclose(model.generator(3.0, 3)(PROMPT, noise_of(model)), theirs, atol=1e-4)


@pytest.mark.parametrize("name,kind", [*((n, k) for n in ("sd3", "flux") for k in PARTS), ("without_t5", "lora_both")])
def test_plain_diffusers_loads_the_adapter_and_paints_the_same_picture(folders, tmp_path, name, kind):
    model = load_model(folders[name])
    noise, frozen = noise_of(model), model.weights_fingerprint
    bare = model.generator(3.0, 3)(PROMPT, noise)
    adapter = lora(model, kind)
    ours = model.generator(3.0, 3)(PROMPT, noise)
    with adapter.off():
        assert torch.allclose(model.generator(3.0, 3)(PROMPT, noise), bare, atol=1e-6)
    assert torch.equal(model.generator(3.0, 3)(PROMPT, noise), ours) and not torch.allclose(ours, bare, atol=1e-4)
    adapter.save(tmp_path)
    pipeline = plain(name, folders[name])
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(ours, generate(pipeline, noise, 3.0), atol=1e-4)
    other = load_model(folders[name])
    lora(other, kind, perturb=False).load(tmp_path)
    assert torch.equal(ours, other.generator(3.0, 3)(PROMPT, noise))
    assert frozen == load_model(folders[name]).weights_fingerprint


@pytest.mark.parametrize("name", ["sd3", "without_t5", "flux"])
def test_a_file_is_an_adapter_and_merged_weights_are_a_model_of_plain_diffusers(folders, tmp_path, name):
    """The LoRA is on all supported layers. At scale .5 it is also exported as a file and merged into a model folder."""
    model = load_model(folders[name])
    adapter = lora(model, "lora_both")
    adapter.save(tmp_path)
    other, half = load_model(folders[name]), load_model(folders[name])
    imported = builder.build_adapter(composed(f"adapter.path={tmp_path / LORA_FILE}"), other)
    assert list(imported.modules) == list(adapter.modules)
    ours = model.generator(3.0, 3)(PROMPT, noise_of(model))
    assert torch.allclose(other.generator(3.0, 3)(PROMPT, noise_of(model)), ours, atol=1e-6)
    for kind in ("diffusers", "merged"):
        export(tmp_path / LORA_FILE, kind, tmp_path / kind, folders[name], 0.5)
    adapter.rescale(0.5)
    wanted = model.generator(3.0, 3)(PROMPT, noise_of(model))
    assert not torch.allclose(wanted, ours, atol=1e-3)
    import_lora(half, [tmp_path / "diffusers"], [1.0])
    assert torch.allclose(half.generator(3.0, 3)(PROMPT, noise_of(model)), wanted, atol=1e-5)
    assert torch.allclose(generate(plain(name, tmp_path / "merged"), noise_of(model), 3.0), wanted, atol=1e-4)
    pipeline = plain(name, folders[name])
    pipeline.load_lora_weights(tmp_path / "diffusers")
    assert torch.allclose(generate(pipeline, noise_of(model), 3.0), wanted, atol=1e-4)


FEWER = {"sd3": ("kohya", "merged", "Stable Diffusion 3"), "flux": ("merged_file", "kohya, merged", "FLUX")}


@pytest.mark.parametrize("name", FEWER)
def test_formats_that_transformers_have_not_are_refused_before_training(folders, tmp_path, name):
    wrong, allowed, family = FEWER[name]
    settings = [f"model={name}", f"model.path={folders[name]}", "model.device=cpu", "judge.path=x"]
    config = composed(*settings, f"export=[merged,{wrong}]")
    with pytest.raises(FairDiffError, match=f"^export: found {wrong}, allowed with {family}: {allowed}$"):
        builder.build_model(config)
    lora(load_model(folders[name]), "lora_unet").save(tmp_path)
    for kind in {wrong, "merged_file"}:
        with pytest.raises(FairDiffError, match=f"{kind} is no format of {family}, allowed: diffusers, {allowed}$"):
            export(tmp_path / LORA_FILE, kind, tmp_path / "out", folders[name])
        assert not (tmp_path / "out").exists()


def test_kohyas_names_are_not_known_of_stable_diffusion_3(folders, tmp_path):
    save_file({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    with pytest.raises(FairDiffError, match="^adapter.path: .*k.safetensors: 1 of 1 tensors fit no layer"):
        builder.build_adapter(composed(f"adapter.path={tmp_path / 'k.safetensors'}"), load_model(folders["sd3"]))


@pytest.mark.parametrize("name,mode", [*((n, m) for n in ("sd3", "flux") for m in MODES), ("without_t5", "unit")])
def test_factorised_gradient_equals_literal_autograd(folders, name, mode):
    model = load_model(folders[name])
    adapter = lora(model, "lora_both")
    used = [p for n, m in adapter.modules.items() for k, p in m.named_parameters() if ".lora_" in k and reached(n, k)]
    adapter.parameters = lambda: used
    ours = factorised(model, adapter, model.scheduler, mode, steps=4)
    oracle = literal(model, adapter, model.scheduler, mode, steps=4)
    assert oracle.norm() > 0 and (ours - oracle).norm() / oracle.norm() <= 1e-5


@pytest.mark.parametrize("name", ["sd3", "without_t5", "flux"])
def test_a_step_trains_every_factor_that_pictures_depend_on_and_nothing_else(folders, name):
    trainee = make_trainee(load_model(folders[name]), "lora_both")
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    result = training_step(trainee, Batch(PROMPT, [0, 1, 2, 3], 3, 0, torch.Generator().manual_seed(0)))
    assert result.kept > 0
    texts = ["text_encoder"] if name == "flux" else ["text_encoder", "text_encoder_2"]
    assert list(trainee.adapter.modules) == [*texts, "transformer"]
    for module_name, module in trainee.adapter.modules.items():
        for key, p in module.named_parameters():
            learns = ".lora_" in key and reached(module_name, key)
            assert (p.grad is not None and bool(p.grad.norm() > 0)) == learns, (module_name, key)
    assert all(p.grad is None for m in trainee.model.text_encoders for n, p in m.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_in_bfloat16_pictures_are_close_and_factors_learn_in_float32(folders, name):
    model = load_model(folders[name])
    noise, low = noise_of(model), load_model(folders[name])
    low.lower_precision(torch.bfloat16)
    low.sampling_dtype = torch.bfloat16
    assert {m.dtype for m in (low.unet, low.vae, low.t5)} == {torch.bfloat16} and low.text_encoder.dtype == torch.float32
    images, expected = (m.generator(3.0, 3)(PROMPT, noise) for m in (low, model))
    assert (images - expected).abs().mean() < 0.02 and images.dtype == torch.float32
    adapter = lora(low, "lora_both")
    used = [p for n, m in adapter.modules.items() for k, p in m.named_parameters() if ".lora_" in k and reached(n, k)]
    adapter.parameters = lambda: used
    assert factorised(low, adapter, low.scheduler, "unit", steps=3).dtype == torch.float32


def flow(spacing="linspace", tokens=4, **options):
    return make_solver("flow_euler", FlowMatchEulerDiscreteScheduler(**options).config, "zero", spacing, tokens)


def test_the_gradient_of_a_flow():
    """z_0 = z_T + sum_t (sigma_{t+1} - sigma_t) v_t; a constant velocity eps - x takes the noise to the image."""
    for solver in (flow(shift=3.0), flow("trailing", use_dynamic_shifting=True)):
        c = solver_coefficients(solver, 6)
        assert c.sum().item() == pytest.approx(-1, abs=1e-6) and (c < 0).all()
        assert torch.allclose(gradient_weights("unit", solver, 6), torch.full((6,), -1 / 6), atol=1e-6)
        assert torch.equal(gradient_weights("solver", solver, 6), c)


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True},
                                     {"use_dynamic_shifting": True, "time_shift_type": "linear"}])  # fmt: skip
def test_reference_weights_invert_how_fast_the_noise_level_changes(options):
    """As in the released code, they are inverse; for levels that are equally spaced before the shift, all are about equal."""
    solver = flow("trailing", tokens=1024, **options)
    weights, c = gradient_weights("reference", solver, 50), solver_coefficients(solver, 50)
    assert (weights / c).log().mean().item() == pytest.approx(0, abs=1e-4)
    assert weights.std() / weights.mean().abs() < 0.15 and (options == {"shift": 1.0} or (c.std() / c.mean()).abs() > 0.15)


def test_the_shift_by_size_is_that_of_fluxs_pipeline():
    """4096 tokens of 1024x1024 have mu = max_shift, 256 have base_shift."""
    for tokens, mu in ((4096, 1.15), (256, 0.5)):
        solver = flow("trailing", tokens, use_dynamic_shifting=True, shift=3.0)
        c = solver_coefficients(solver, 2)
        assert 1 + c[0].item() == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), abs=1e-5)


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["model.padding=longest"], "model.padding: found longest, allowed with FLUX .*: max_length"),
        (["sampler.scheduler=dpm"], "sampler.scheduler: found dpm, allowed with a flow-matching model: flow_euler"),
        (["sampler.spacing=leading"], "sampler.spacing: found leading, allowed with flow_euler: linspace, trailing"),
        (["prompts.negative=a hat"], "prompts.negative: found 'a hat', which nothing reads"),
        (["adapter=soft_tokens"], "adapter.type: found soft_tokens, allowed with FLUX: lora"),
    ],
)
def test_what_it_cannot_do_is_one_line(folders, overrides, says):
    config = composed("model=flux", f"model.path={folders['flux']}", "model.device=cpu", "judge.path=x", *overrides)
    with pytest.raises(FairDiffError, match=says) as caught:
        builder.build_adapter(config, builder.build_model(config))
    assert "\n" not in str(caught.value)


def test_a_flow_solver_is_of_flow_models_only(tiny_folder):
    with pytest.raises(FairDiffError, match="sampler.scheduler: found flow_euler, allowed with a model of noise"):
        builder.build_model(composed(f"model.path={tiny_folder}", "sampler.scheduler=flow_euler"))


def drop(state):
    state.pop("encoder.final_layer_norm.weight")


@pytest.mark.parametrize(
    "name,change,says",
    [
        ("sd3", lambda a, b: with_json(a, b, "transformer/config.json", joint_attention_dim=24), "context_embedder"),
        ("flux", lambda a, b: with_scheduler(a, b, DDIMScheduler()), "its scheduler is DDIMScheduler"),
        ("flux", lambda a, b: with_json(a, b, "scheduler/scheduler_config.json", stochastic_sampling=True),
         "stochastic_sampling is on"),
        ("flux", lambda a, b: with_json(a, b, "model_index.json", text_encoder_2=[None, None]),
         "has None for text_encoder_2, allowed: T5EncoderModel"),
        ("flux", lambda a, b: with_tensors(a, b, "text_encoder_2", drop), "the tensors of text_encoder_2: 1 missing"),
        ("flux", lambda a, b: with_json(a, b, "vae/config.json", scaling_factor=0.0), "scaling_factor is 0.0"),
    ],
)  # fmt: skip
def test_what_would_be_painted_wrongly_is_refused_in_one_line(folders, tmp_path, name, change, says):
    with pytest.raises(FairDiffError, match=says) as caught:
        load_model(change(folders[name], tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "without_t5", "flux"])
def test_train_py_trains_audits_and_saves_what_the_plain_pipeline_loads(folders, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch(
        tmp_path / "run", *BESIDE_EMBEDDED, f"model={'flux' if name == 'flux' else 'sd3'}",
        f"model.path={folders[name]}", "adapter=lora_both", "export=[merged]", "model.dtype=float32",
        f"audit.judge.path={uncalibrated(tmp_path / 'judge')}", "audit.prompts=1", "audit.without_people=1",
    )  # fmt: skip
    (audits,) = (tmp_path / "run" / "audits").iterdir()
    assert json.loads((audits / "audit.json").read_text())["models"]["after"]["dino"]["mean"] < 1
    pipeline = plain(name, folders[name])
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    bare = generate(pipeline, noise, 3.5)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    changed = generate(pipeline, noise, 3.5)
    assert not torch.allclose(bare, changed, atol=1e-6)
    assert torch.allclose(generate(plain(name, tmp_path / "run" / "exports" / "merged"), noise, 3.5), changed, atol=1e-4)


def test_the_shapes_of_the_released_models_fit():
    """Two blocks of each kind of FLUX.1-dev and stable-diffusion-3.5-medium (transformer/config.json), on the meta device."""
    with torch.device("meta"):
        dev = FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=2)
        medium = SD3Transformer2DModel(
            num_layers=2, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )  # fmt: skip
        latent, t = torch.empty(1, 16, 128, 128), torch.tensor(500.0)
        for net, words, pooled in ((dev, 512, 768), (medium, 77 + 256, 2048)):
            text = with_row(torch.empty(1, words, 4096), torch.empty(1, pooled))
            assert call_unet(net, latent, t, text, 3.5).shape == latent.shape
            assert image_tokens(net, latent.shape[1:]) == 4096
