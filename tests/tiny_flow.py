"""Tiny Stable Diffusion 3 and FLUX: the real classes with random weights, 16x16 images of 4x4 latents."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import WORDS, tiny_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 32  # of T5's words


def clip(kind, tokenizer, width, projection):
    size = len(tokenizer)
    return kind(CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, projection_dim=projection, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=size - 1,
    ))  # fmt: skip


def t5():
    """Return T5 and a unigram tokenizer with the words of the tests."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in dict.fromkeys(WORDS))]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    model = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    ))  # fmt: skip
    return model, tokenizer


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def sd3(folder: Path) -> Path:
    """Return a model like 3.5: a second attention in the first block, normalised queries and keys."""
    torch.manual_seed(4)
    tokenizer, (words, t5_tokenizer) = tiny_tokenizer(folder), t5()
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(),
        clip(CLIPTextModelWithProjection, tokenizer, 8, 6), tokenizer,
        clip(CLIPTextModelWithProjection, tokenizer, 12, 10), tokenizer, words, t5_tokenizer,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


def sd3_without_t5(folder: Path) -> Path:
    """Return the same model without T5, as plain diffusers saves it."""
    whole = StableDiffusion3Pipeline.from_pretrained(sd3(folder), text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(folder / "without_t5")
    return folder / "without_t5"


def flux(folder: Path, dev: bool = True) -> Path:
    """Return a model like FLUX.1 dev, which reads the guidance scale and shifts its schedule by the size, or like schnell."""
    torch.manual_seed(5)
    tokenizer, (words, t5_tokenizer) = tiny_tokenizer(folder), t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=8, guidance_embeds=dev, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if dev else None
    FluxPipeline(
        scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0), vae(), clip(CLIPTextModel, tokenizer, 8, 8), tokenizer,
        words, t5_tokenizer, transformer,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"
