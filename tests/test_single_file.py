"""Whole models in one file of the web UI's kind: the images are those of the diffusers folder, to the bit."""

import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from ldm import checkpoint, of_unet, of_vae
from safetensors.torch import load_file, save_file
from tiny import make_trainee
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fairdiff.diffusion.export import KOHYA_FILE, MERGED_FILE, export
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import shapes_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.single_file import (
    _below,
    clip_tokenizer,
    file_on_no_device,
    read_single_file,
    text_config,
    unet_config,
    vae_config,
)
from fairdiff.diffusion.solvers import make_solver
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse, a person"
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False,
}  # fmt: skip


def tokenizer(pad="<|endoftext|>"):
    return CLIPTokenizer.from_pretrained(weights("model") / "tokenizer", pad_token=pad)


def text(width, act, layers, **more):
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1), hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        **{"projection_dim": width} | more,
    )  # fmt: skip


def unet(channels, side, **more):
    return UNet2DConditionModel(sample_size=side, block_out_channels=channels, **more)


def vae(scaling):
    return AutoencoderKL(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, scaling_factor=scaling,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, sample_size=16,
    )  # fmt: skip


def one():
    network = unet(
        (32, 64), 64, cross_attention_dim=32, attention_head_dim=8, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    encoder = CLIPTextModel(text(32, "quick_gelu", 2))
    scheduler = PNDMScheduler(**{k: v for k, v in BETAS.items() if k != "clip_sample"}, skip_prk_steps=True)
    return StableDiffusionPipeline(
        vae(0.18215), encoder, tokenizer(), network, scheduler, None, None, requires_safety_checker=False
    )


def two():
    network = unet(
        (64, 128), 96, cross_attention_dim=64, attention_head_dim=(1, 2), use_linear_projection=True,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    encoder, scheduler = CLIPTextModel(text(64, "gelu", 2)), DDIMScheduler(**BETAS, prediction_type="v_prediction")
    return StableDiffusionPipeline(
        vae(0.18215), encoder, tokenizer("!"), network, scheduler, None, None, requires_safety_checker=False
    )


def xl():
    network = unet(
        (64, 128), 128, cross_attention_dim=64 + 128, attention_head_dim=(1, 2), use_linear_projection=True,
        layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=96 + 6 * 256,
    )  # fmt: skip
    second = CLIPTextModelWithProjection(text(128, "gelu", 3, projection_dim=96))
    encoders = CLIPTextModel(text(64, "quick_gelu", 2)), second
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    scheduler.register_to_config(set_alpha_to_one=False)  # the released file says so, and diffusers keeps it
    return StableDiffusionXLPipeline(
        vae(0.13025), *encoders, tokenizer(), tokenizer("!"), network, scheduler, add_watermarker=False
    )


KINDS = {"sd15": one, "sd21": two, "sdxl": xl}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return kind -> (folder, file) of the same tiny model; each is written once."""
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            root = tmp_path_factory.mktemp(kind)
            pipeline = KINDS[kind]()
            pipeline.save_pretrained(root / "model")
            save_file(checkpoint(pipeline), root / "model.safetensors")
            (root / "model.yaml").write_text("model: {params: {parameterization: v}}\n" if kind == "sd21" else "{}")
            made[kind] = root / "model", root / "model.safetensors"
        return made[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_folder_to_the_bit(saved, kind):
    models = [load_model(path) for path in saved(kind)]
    assert models[0].latent_shape == models[1].latent_shape
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if (module := getattr(models[0], name)) is not None:
            theirs, ours = module.state_dict(), getattr(models[1], name).state_dict()
            assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    noise, schedules = initial_noise(PROMPT, 0, [0], (4, 8, 8)), [model.scheduler.config for model in models]
    for solver, spacing in (("dpm", "linspace"), ("ddim", "leading"), ("euler", "leading")):
        for model, schedule in zip(models, schedules, strict=True):
            model.scheduler = make_solver(solver, schedule, "zero", spacing)
        images = [model.generator(5.0, 3)(PROMPT, noise) for model in models]
        assert images[0].std() > 0.01 and torch.equal(*images)


def test_half_precision_and_names_of_old_merges_are_read(saved, tmp_path):
    folder, file = saved("sd15")
    state = load_file(file)
    old = {k.replace("transformer.text_model.", "transformer."): v for k, v in state.items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in old.items()}
    save_file(half, tmp_path / "half.safetensors")
    model, expected = load_model(tmp_path / "half.safetensors"), load_model(folder)
    for ours, theirs in zip(model.unet.parameters(), expected.unet.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.half().float())


def test_the_tokenizer_is_that_of_the_released_files():
    """Portraits carries CLIP's own vocab.json and merges.txt."""
    theirs, ours = tokenizer(), clip_tokenizer()
    texts = [PROMPT, "L'été à Paris, 12 naïve 日本 <|endoftext|> x", "  A  Nurse\n", ""]
    for given in texts:
        assert theirs(given).input_ids == ours(given).input_ids
    assert ours("", padding="max_length").input_ids[1:] == [49407] * 76
    assert clip_tokenizer(pad="!")("", padding="max_length").input_ids[2:] == [0] * 75


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_what_is_trained_on_a_file_is_exported_with_it_as_with_the_folder(saved, tmp_path, kind):
    """Exports from file and folder agree tensor by tensor; the file's header suffices for layers and shapes."""
    states = []
    for name, path in zip(("folder", "file"), saved(kind), strict=True):
        model = load_model(path)
        model.size, model.scheduler = (16, 16), make_solver("dpm", model.scheduler.config, "zero", "linspace")
        named = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2, "unet": model.unet}
        wanted = shapes_of({key: module for key, module in named.items() if module is not None})
        assert name == "folder" or shapes_of(file_on_no_device(path)) == wanted
        trainee = make_trainee(model, "lora_both")
        training_step(trainee, Batch(PROMPT, [0, 1, 2, 3], 2, 0, torch.Generator().manual_seed(0)))
        for module in (m for m in named.values() if m is not None):  # the last layer of XL's first encoder is not read
            assert any(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
        torch.optim.SGD(trainee.adapter.parameters(), 0.1).step()
        (folder := tmp_path / name / "adapter").mkdir(parents=True)
        trainee.adapter.save(folder)
        for form in ("kohya", "merged", "merged_file"):
            export(folder, form, tmp_path / name / form, path)
        files = [f"kohya/{KOHYA_FILE}", f"merged_file/{MERGED_FILE}", "merged/unet/diffusion_pytorch_model.safetensors"]
        states.append([load_file(tmp_path / name / file) for file in files])
    for theirs, ours in zip(*states, strict=True):
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    merged = [load_model(tmp_path / "file" / name) for name in ("merged", f"merged_file/{MERGED_FILE}")]
    noise = initial_noise(PROMPT, 0, [0], (4, 4, 4))
    for model in merged:
        model.scheduler = make_solver("ddim", merged[0].scheduler.config, "zero", "trailing")
    images = [model.generator(3.0, 2)(PROMPT, noise) for model in merged]
    assert torch.equal(*images)


LEFT = {  # by training and merging, as found in files; of XL where they name a conditioner
    "cond_stage_model.transformer.text_projection.weight": (32, 32),
    "cond_stage_model.transformer.logit_scale": (),
    "cond_stage_model.logit_scale": (),
    "first_stage_model.loss.logvar": (),
    "first_stage_model.loss.discriminator.main.0.weight": (4, 3, 4, 4),
    "first_stage_model.model_ema.decay": (),
    "first_stage_model.model_ema.num_updates": (),
    "first_stage_model.model_ema.encoderconv_inweight": (32, 3, 3, 3),
    "conditioner.embedders.0.transformer.text_projection.weight": (64, 64),
    "conditioner.embedders.0.transformer.logit_scale": (),
    "conditioner.embedders.1.model.logit_scale": (),
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": (1, 77),
}


@pytest.mark.parametrize("name", LEFT)
def test_tensors_that_nothing_reads_are_left_out(saved, tmp_path, name):
    kind = "sdxl" if name.startswith("conditioner") else "sd15"
    model = load_model(changed(saved, tmp_path, kind, lambda state: state.update({name: torch.ones(LEFT[name])})))
    assert model.weights_fingerprint == load_model(saved(kind)[1]).weights_fingerprint


def changed(saved, tmp_path, kind, change):
    """A file with the tensors of a kind, changed in place."""
    state = load_file(saved(kind)[1])
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


UNET_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
FOREIGN = {
    "a tensor less": (
        lambda s: s.pop(UNET_KEY),
        r"tensors of the U-Net: 1 missing \(down_blocks.0.resnets.0.conv1.weight\)",
    ),
    "a tensor more": (
        lambda s: s.update({"model.diffusion_model.new.weight": torch.ones(2)}),
        r"tensors of the U-Net: 1 unexpected \(model.diffusion_model.new.weight\)",
    ),
    "a misshapen tensor": (lambda s: s.update({UNET_KEY: torch.ones(3, 3)}), "the U-Net: 1 misshapen"),
    "no first tensor": (
        lambda s: s.pop("model.diffusion_model.input_blocks.0.0.weight"),
        "lacks the tensor 'input_blocks.0.0.weight', which Stable Diffusion 1.x has",
    ),
    "a text encoder's tensor less": (
        lambda s: s.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        "tensors of the text_encoder: 1 missing .*final_layer_norm.bias",
    ),
    "no VAE": (lambda s: [s.pop(k) for k in [*s] if k.startswith("first_stage")], "holds no VAE"),
    "a LoRA": (
        lambda s: (s.clear(), s.update({"lora_unet_mid_block.lora_up.weight": torch.ones(2, 2)})),
        "holds a LoRA, not a whole model",
    ),
    "a VAE alone": (
        lambda s: [s.pop(k) for k in [*s] if not k.startswith("first_stage")],
        "holds no U-Net and no text encoder",
    ),
    "nothing": (lambda s: s.clear(), r"holds no U-Net and no VAE and no text encoder \(no tensors\)"),
    "an inpainting model": (
        lambda s: s.update({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}),
        "its U-Net has 9 channels in and 4 out",
    ),
    "zero terminal SNR": (
        lambda s: s.update(v_pred=torch.ones(0), ztsnr=torch.ones(0)),
        "rescale_betas_zero_snr, noise without any image at the first step",
    ),
    "not finite": (lambda s: s.update({UNET_KEY: s[UNET_KEY] * float("nan")}), "not finite in UNet2DConditionModel"),
}


@pytest.mark.parametrize("damage", FOREIGN)
def test_what_is_no_whole_model_is_one_line_that_says_what_it_is(saved, tmp_path, damage):
    change, says = FOREIGN[damage]
    file = changed(saved, tmp_path, "sd15", change)
    with pytest.raises(FairDiffError, match=f"^model.path: .*model.safetensors.*{says}") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


def test_the_file_or_the_one_beside_it_says_what_is_predicted(saved, tmp_path):
    def predicts(file):
        pipeline = read_single_file(file)
        return pipeline.scheduler.config.prediction_type, pipeline.unet.config.sample_size

    file = shutil.copy(saved("sd21")[1], tmp_path / "model.safetensors")
    with pytest.raises(FairDiffError, match="velocity .* write model.yaml beside it .*parameterization: v.*, or eps"):
        load_model(file)
    beside = tmp_path / "model.yaml"
    beside.write_text("model: {params: {linear_start: 0.00085}}")  # the original's default
    assert predicts(file) == ("epsilon", 64)
    beside.write_text("model: {params: {parameterization: v}}")
    assert predicts(file) == ("v_prediction", 96)
    beside.write_text("model: {params: {parameterization: x0}}")
    with pytest.raises(FairDiffError, match="model.yaml: model.params.parameterization: found x0, allowed: eps, v"):
        load_model(file)
    beside.unlink()
    marked = changed(saved, tmp_path, "sdxl", lambda state: state.update(v_pred=torch.ones(0)))
    assert predicts(marked) == ("v_prediction", 128)


@pytest.mark.parametrize(
    "name,says",
    [
        ("model.ckpt", "is a pickle, which can run code when it is read; allowed: .safetensors"),
        ("short.safetensors", "cannot be read as a .safetensors file"),
        ("text.safetensors", "cannot be read as a .safetensors file"),
        ("missing.safetensors", "no such file"),
    ],
)
def test_files_that_are_not_read(saved, tmp_path, name, says):
    data = saved("sd15")[1].read_bytes()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "short.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FairDiffError, match=f"^model.path: .*{name}: {says}") as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)


RELEASED = {  # the shapes of the released files; what each kind's configuration on the hub says
    "1.x": dict(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
    ),
    "2.x": dict(
        sample_size=96, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024, use_linear_projection=True,
        attention_head_dim=(5, 10, 20, 20),
    ),
    "XL": dict(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RELEASED)
def test_the_released_configuration_is_read_off_the_shapes(kind):
    """The configurations are unet/config.json and vae/config.json of the hub, on the meta device."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**RELEASED[kind])
        decoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    shapes = {name: list(tensor.shape) for name, tensor in (of_unet(network) | of_vae(decoder)).items()}
    found = unet_config(_below(shapes, "model.diffusion_model."), 8 if kind == "1.x" else None)
    for key, value in found.items():
        wanted = network.config[key]
        wanted = [wanted] * len(value) if isinstance(value, list) and isinstance(wanted, int) else wanted
        assert list(wanted) == value if isinstance(value, list) else wanted == value, key
    for key, value in vae_config(_below(shapes, "first_stage_model."), 0.18215).items():
        wanted = decoder.config[key]
        assert (list(wanted) if isinstance(value, list) else wanted) == value, key


def test_the_released_text_encoders_are_read_off_their_shapes():
    """text_encoder_2/config.json of stable-diffusion-xl-base-1.0: OpenCLIP's bigG/14."""
    shapes = {
        "token_embedding.weight": [49408, 1280], "positional_embedding": [77, 1280], "text_projection": [1280, 1280],
        **{f"transformer.resblocks.{i}.mlp.c_fc.weight": [5120, 1280] for i in range(32)},
    }  # fmt: skip
    found = text_config(shapes, open_clip=True)
    assert found == {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 20, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 1280,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
