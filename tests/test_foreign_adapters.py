"""Adapters of other tools can be audited or trained further: W + Σ scale (alpha/r) B A on any layers, or an error."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_adapters import PROMPT, make, picture
from test_exports import plain, plain_picture
from tiny import composed, make_trainee

from fairdiff import builder
from fairdiff.diffusion.adapter_files import LORA_FILE, TEXT_ROOT
from fairdiff.diffusion.export import A1111_FILE, KOHYA_FILE, export
from fairdiff.diffusion.imports import import_lora, import_soft_tokens
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import Factors, kohya_names, read_lora, shapes_of
from fairdiff.diffusion.textual_inversion import read_embedding
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.training.step import Batch, training_step

LAYERS = {  # of many kinds, each with a rank and an alpha of its own
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"): (2, 1.0),
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"): (3, 6.0),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"): (2, 0.5),
    ("unet", "down_blocks.1.attentions.0.proj_in"): (4, 4.0),  # a convolution of 1x1
    ("unet", "up_blocks.0.resnets.1.conv1"): (3, 2.0),  # of 3x3
    ("unet", "down_blocks.0.downsamplers.0.conv"): (2, 3.0),  # of stride 2
    ("unet", "time_embedding.linear_1"): (1, 1.0),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"): (5, 2.5),
    ("text_encoder", "encoder.layers.1.mlp.fc1"): (2, 8.0),
}


def modules_of(model):
    return {"text_encoder": model.text_encoder, "unet": model.unet}


def factors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for (module, layer), (rank, alpha) in LAYERS.items():
        shape = shapes[module][layer]
        down = 0.3 * torch.randn(rank, *shape[1:], generator=generator)
        up = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        found.setdefault(module, {})[layer] = Factors(down, up, alpha)
    return found


def kohya_file(path, model, seed=0):
    """Write a file like kohya's scripts, with integer alphas where possible, and return its factors."""
    shapes = shapes_of(modules_of(model))
    names, layers, state = kohya_names(shapes), factors(shapes, seed), {}
    for module, part in layers.items():
        for layer, f in part.items():
            name = names[module, layer]
            alpha = torch.tensor(int(f.alpha) if f.alpha == int(f.alpha) else f.alpha)
            state |= {f"{name}.lora_down.weight": f.down, f"{name}.lora_up.weight": f.up, f"{name}.alpha": alpha}
    save_file(state, path)
    return layers


def folded(model, *files):
    """Return the model with scale times the update of each file added to its weights, as the expected result."""
    for layers, scale in files:
        for name, part in layers.items():
            inner = {n.removeprefix(TEXT_ROOT): m for n, m in modules_of(model)[name].named_modules()}
            for layer, f in part.items():
                delta = (f.alpha / len(f.down)) * torch.einsum("orhw,r...->o...", _four(f.up), f.down)
                inner[layer].weight.data.add_(delta, alpha=scale)
    return model


def _four(up):
    return up if up.ndim == 4 else up[..., None, None]


class Bare:
    prefix = ""


@pytest.fixture
def file(tiny_folder, tmp_path):
    return tmp_path / "one.safetensors", kohya_file(tmp_path / "one.safetensors", load_model(tiny_folder))


def test_any_kohya_file_adds_what_it_says_and_off_is_the_frozen_model_bit_for_bit(tiny_folder, file):
    path, layers = file
    model, frozen = load_model(tiny_folder), load_model(tiny_folder)
    bare = picture(frozen, Bare)
    adapter = import_lora(model, [path], [1.0])
    on = picture(model, adapter)
    with adapter.off():
        assert torch.equal(picture(model, adapter), bare)
    assert torch.equal(picture(model, adapter), on)
    assert (on - bare).abs().max() > 1e-2
    assert torch.allclose(on, picture(folded(frozen, (layers, 1.0)), Bare), atol=1e-5)
    assert all(p.requires_grad for p in adapter.parameters()) and len(adapter.parameters()) == 2 * len(LAYERS)


def test_several_files_add_up_each_with_its_scale(tiny_folder, file, tmp_path):
    path, layers = file
    other = kohya_file(tmp_path / "two.safetensors", load_model(tiny_folder), seed=1)
    state = load_file(tmp_path / "two.safetensors")
    save_file({k: v for k, v in state.items() if "lora_te" not in k}, tmp_path / "two.safetensors")
    other.pop("text_encoder")
    config = composed(f"adapter.path=[{path},{tmp_path / 'two.safetensors'}]", "adapter.scale=[1.5,.5]", "cache=null")
    model = load_model(tiny_folder)
    adapter = builder.build_adapter(config, model)
    wanted = picture(folded(load_model(tiny_folder), (layers, 1.5), (other, 0.5)), Bare)
    assert torch.allclose(picture(model, adapter), wanted, atol=1e-5)
    scales = [builder.adapter_fingerprint(composed(*o, f"adapter.path=[{path},{path}]")) for o in ([], ["adapter.scale=.5"])]
    assert len({*scales, builder.adapter_fingerprint(config)}) == 3


def test_a_file_of_diffusers_with_patterns_adds_what_plain_diffusers_adds(tiny_folder, tmp_path):
    """The file has patterns of ranks and alphas, also rank-stabilised, with the scale alpha / √r."""
    for extra in ({}, {"use_rslora": True}):
        model, given = load_model(tiny_folder), {}
        for name, module in modules_of(model).items():
            ends = ["to_k", "to_q"] if name == "unet" else ["q_proj", "fc1"]
            one = "attn2.to_k" if name == "unet" else r"layers\.1\.mlp\.fc1"
            patterns = {"rank_pattern": {ends[1]: 2}, "alpha_pattern": {one: 9, ends[0]: 1}}
            config = LoraConfig(r=4, lora_alpha=6, target_modules=ends, init_lora_weights=False, **patterns, **extra)
            inject_adapter_in_model(config, module)
            about = config.to_dict() | {"target_modules": ends}
            kept = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
            given[f"{name}_lora_layers"] = {
                (TEXT_ROOT if name == "text_encoder" else "") + key: 3 * value
                for key, value in get_peft_model_state_dict(module).items()
            }
            given[f"{name}_lora_adapter_metadata"] = {key: about[key] for key in kept}
        StableDiffusionPipeline.save_lora_weights(tmp_path, **given)
        pipeline = plain(tiny_folder)
        pipeline.load_lora_weights(tmp_path / LORA_FILE)
        other = load_model(tiny_folder)
        ours = picture(other, import_lora(other, [tmp_path], [1.0]))
        assert torch.allclose(plain_picture(pipeline), ours, atol=1e-4)
        assert not torch.allclose(ours, picture(load_model(tiny_folder), Bare), atol=1e-2)


@pytest.mark.parametrize("old", ["lora.{}.weight", "lora_linear_layer.{}.weight", "processor"])
def test_names_of_earlier_versions_of_diffusers_are_known(old, tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    shapes = shapes_of(modules_of(model))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    f = factors(shapes)["unet"][name]
    stem = f"unet.{name}.{old}"
    if old == "processor":
        stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight"
    save_file({stem.format("down"): f.down, stem.format("up"): f.up}, tmp_path / "old.safetensors")
    (found,) = read_lora(tmp_path / "old.safetensors", shapes)["unet"].items()
    assert found[0] == name and torch.equal(found[1].down, f.down) and found[1].alpha == found[1].rank == 3


CONV = "lora_unet_up_blocks_0_resnets_1_conv1"
TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"
WRONG = {  # what is done to a good file, what is said
    "of another model": (
        lambda s: {k.replace("layers_1", "layers_11"): v for k, v in s.items()},
        rf"3 of 27 tensors fit no layer, the first is {TEXT.replace('_1_', '_11_')}\.alpha; allowed: LoRA of linear",
    ),
    "LoHa": (
        lambda s: s | {f"{CONV}.hada_w1_a": torch.ones(2, 2)},
        rf"1 of 28 tensors fit no layer, the first is {CONV}\.hada_w1_a; .* another kind of adapter \(LoHa",
    ),
    "DoRA": (lambda s: s | {f"{CONV}.dora_scale": torch.ones(2, 2)}, "dora_scale is of another kind"),
    "half a pair": (
        lambda s: {k: v for k, v in s.items() if k != f"{CONV}.lora_up.weight"},
        r"unet\.up_blocks\.0\.resnets\.1\.conv1 has only .*down, allowed: both factors",
    ),
    "misshapen": (
        lambda s: s | {f"{TEXT}.lora_up.weight": torch.ones(24, 3)},
        r"text_encoder\.encoder\.layers\.1\.mlp\.fc1: found factors \[2, 16\] and \[24, 3\], its weight is \[24, 16\]",
    ),
    "not finite": (lambda s: s | {f"{TEXT}.lora_up.weight": torch.full((24, 2), torch.nan)}, f"{TEXT}.* not finite"),
    "alpha of two numbers": (lambda s: s | {f"{TEXT}.alpha": torch.ones(2)}, "its alpha is no finite number"),
    "soft tokens": (lambda s: {"emb_params": torch.ones(2, 16)}, "1 of 1 tensors fit no layer, the first is emb_params"),
    "nothing": (lambda s: {}, "holds no tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_fits_in_part_is_refused_by_how_many_tensors_do_not_and_the_first(wrong, tiny_folder, file):
    path, _ = file
    change, says = WRONG[wrong]
    save_file(change(load_file(path)), path)
    with pytest.raises(FairDiffError, match=f"^{re.escape(str(path))}.*{says}") as caught:
        read_lora(path, shapes_of(modules_of(load_model(tiny_folder))))
    assert "\n" not in str(caught.value)


def test_training_goes_on_with_a_files_own_layers_and_what_it_saves_is_such_a_file(tiny_folder, file, tmp_path):
    path, _ = file
    model = load_model(tiny_folder)
    config = composed(f"adapter.path={path}", "cache=null")
    perception = make_trainee(load_model(tiny_folder)).perception
    trainee = builder.build_trainee(config, make_plan(config), model, perception)
    before = picture(model, trainee.adapter)
    result = training_step(trainee, Batch(PROMPT, [0, 1], 3, 0, torch.Generator().manual_seed(0)))
    assert result.faces == 2
    for p in trainee.adapter.parameters():
        assert p.grad is not None and p.grad.norm() > 0
        p.data.sub_(0.05 * p.grad / p.grad.norm())
    after = picture(model, trainee.adapter)
    assert not torch.allclose(before, after, atol=1e-4)
    trainee.adapter.save(tmp_path)
    again, pipeline = load_model(tiny_folder), plain(tiny_folder)
    assert torch.allclose(picture(again, import_lora(again, [tmp_path / LORA_FILE], [1.0])), after, atol=1e-6)
    pipeline.load_lora_weights(tmp_path / LORA_FILE)
    assert torch.allclose(plain_picture(pipeline), after, atol=1e-4)
    with pytest.raises(FairDiffError, match="one rank and alpha for all layers; adapter.path takes the file itself"):
        builder.build_adapter(composed(f"adapter.path={tmp_path}"), load_model(tiny_folder))
    assert builder.adapter_options(config).keys() == {"type", "learning_rate", "path", "scale"}


def test_an_export_is_an_import(tiny_folder, tmp_path):
    model, other = load_model(tiny_folder), load_model(tiny_folder)
    adapter = make(model, "lora_both")
    adapter.save(tmp_path)
    export(tmp_path, "kohya", tmp_path / "kohya", tiny_folder)
    config = composed(f"adapter.path={tmp_path / 'kohya' / KOHYA_FILE}", f"model.path={tiny_folder}", "cache=null")
    imported = builder.build_saved_adapter(config, make_plan(config, training=False), other)
    assert torch.allclose(picture(other, imported), picture(model, adapter), atol=1e-6)


def test_textual_inversions_stand_one_after_the_other_each_with_its_scale(tiny_folder, tmp_path):
    one = make(model := load_model(tiny_folder), "soft_tokens")
    one.save(tmp_path)
    ours = picture(model, one)
    export(tmp_path, "a1111", tmp_path / "a1111", tiny_folder)
    torch.save({"string_to_param": {"*": torch.ones(2, 16)}, "name": "x"}, tmp_path / "a1111.pt")
    torch.save({"<other>": torch.full((16,), 2.0)}, tmp_path / "learned_embeds.bin")
    alone, three = load_model(tiny_folder), load_model(tiny_folder)
    single = import_soft_tokens(alone, [tmp_path / "a1111" / A1111_FILE], [1.0], "chef")
    assert torch.equal(picture(alone, single), ours) and torch.equal(single.origin[0], one.origin[0])
    paths = [tmp_path, tmp_path / "a1111.pt", tmp_path / "learned_embeds.bin"]
    config = composed("adapter=soft_tokens", f"adapter.path=[{','.join(map(str, paths))}]", "adapter.scale=[1,0,.5]")
    adapter = builder.build_adapter(config, three)
    soft = adapter.embeddings[0].soft
    words = adapter.words(config.adapter.initial_text, 2)[0]
    assert torch.equal(soft[:3], one.embeddings[0].soft) and torch.equal(soft[3:5], words)
    assert torch.allclose(soft[5], (2 + words[0]) / 2) and adapter.prefix.count("fairdiff") == len(soft) == 6


def peft_folder(folder, module, state, **settings):
    """Write one module's LoRA like `PeftModel.save_pretrained`."""
    folder.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings))
    return folder / "adapter_model.safetensors"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("module", ["text_encoder", "unet"])
def test_lora_that_peft_itself_saved_adds_what_peft_adds(tiny_folder, tmp_path, module):
    """Its file does not name the module, and another file has its alpha."""
    model, other = load_model(tiny_folder), load_model(tiny_folder)
    base = modules_of(model)[module]
    targets = ["to_k", "proj_in"] if module == "unet" else ["q_proj", "fc1"]
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # "auto" looks for the model's folder
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    assert all(key.startswith("base_model.model.") for key in load_file(file))
    adapter = builder.build_adapter(composed(f"adapter.path={file}"), other)
    assert list(adapter.modules) == [module]
    assert torch.allclose(picture(other, adapter), picture(model, Bare), atol=1e-5)
    with adapter.off(), wrapped.disable_adapter():
        assert torch.allclose(picture(other, adapter), picture(model, Bare), atol=1e-6)


def test_files_of_pefts_own_that_do_not_say_enough_are_one_line(tiny_folder, tmp_path):
    shapes = shapes_of({"text_encoder": load_model(tiny_folder).text_encoder})
    shapes["text_encoder_2"] = shapes["text_encoder"]
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.weight": torch.ones(4, 16), f"{layer}.lora_B.weight": torch.ones(16, 4)}
    file = peft_folder(tmp_path / "two", "text_encoder", pair)
    with pytest.raises(FairDiffError, match="fits text_encoder and text_encoder_2 alike and does not name its module"):
        read_lora(file, shapes | {"unet": shapes_of({"unet": load_model(tiny_folder).unet})["unet"]})
    shapes = shapes_of(modules_of(load_model(tiny_folder)))
    (found,) = read_lora(file, shapes)["text_encoder"].values()
    assert (found.rank, found.alpha) == (4, 8)
    (rooted,) = read_lora(peft_folder(tmp_path / "rs", "", pair, use_rslora=True), shapes)["text_encoder"].values()
    assert rooted.alpha == 8 * 2
    before = builder.adapter_fingerprint(composed(f"adapter.path={file}"))
    (file.parent / "adapter_config.json").write_text('{"lora_alpha": 4}')
    assert builder.adapter_fingerprint(composed(f"adapter.path={file}")) != before
    (file.parent / "adapter_config.json").unlink()
    with pytest.raises(FairDiffError, match="was saved by peft, and adapter_config.json, which says its alpha, is not"):
        read_lora(file, shapes)
    wide = {f"{layer}.lora_A.weight": torch.ones(4, 7), f"{layer}.lora_B.weight": torch.ones(16, 4)}
    with pytest.raises(FairDiffError, match="2 of 2 tensors fit no layer"):
        read_lora(peft_folder(tmp_path / "wide", "", wide), shapes)


def test_files_that_are_no_textual_inversion_are_refused_in_one_line(tiny_folder, tmp_path, file):
    path, _ = file

    class Code:
        def __reduce__(self):
            return print, ("executed",)

    torch.save(Code(), tmp_path / "code.pt")
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 16)}, tmp_path / "xl.safetensors")
    save_file({"x": torch.ones(1, 8)}, tmp_path / "narrow.safetensors")
    save_file({"x": torch.zeros(1, 16)}, tmp_path / "zeros.safetensors")
    for name, says in [
        (path.name, r"holds 27 tensors .*; allowed: one, a textual inversion .*adapter\.type=lora"),
        ("xl.safetensors", "holds tokens of 2 text encoders, the model has 1 that read them"),
        ("narrow.safetensors", "its embeddings have width 8, the text encoder 16"),
        ("zeros.safetensors", "a token of x holds nothing but zeros"),
        ("code.pt", "cannot read it without running code"),
        ("missing.safetensors", "cannot read it without running code"),
    ]:
        config = composed("adapter=soft_tokens", f"adapter.path={tmp_path / name}")
        with pytest.raises(FairDiffError, match=f"^adapter.path: .*{name}: {says}") as caught:
            builder.build_adapter(config, load_model(tiny_folder))
        assert "\n" not in str(caught.value)


def test_a_textual_inversion_as_its_authors_saved_it_is_read_without_running_code(tmp_path):
    """string_to_param is a ParameterDict there, that of another torch among them; code beside it is none the less refused."""
    allowed = torch.serialization.get_safe_globals()
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.arange(32.0).view(2, 16))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}, tmp_path / "a.pt")
    del held.__dict__["_keys"]  # which torch 1.11 had not
    torch.save({"string_to_param": held}, tmp_path / "old.pt")
    for name in ("a.pt", "old.pt"):
        (rows,), text = read_embedding(tmp_path / name)
        assert torch.equal(rows, torch.arange(32.0).view(2, 16)) and text is None and not rows.requires_grad

    class Code:
        def __reduce__(self):
            return print, ("executed",)

    held.extra = Code()
    torch.save({"string_to_param": held}, tmp_path / "code.pt")
    with pytest.raises(FairDiffError, match="code.pt: cannot read it without running code"):
        read_embedding(tmp_path / "code.pt")
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["adapter.path=[a,b]", "adapter.scale=[1]"], "adapter.scale: found 1 for 2 of adapter.path, allowed: one for each"),
        (["adapter.path=[]"], r"adapter.path: found \[\], allowed: a path, a list of paths, or null"),
        (["adapter.path=[a,3]"], r"adapter.path: found \['a', 3\], allowed"),
        (["adapter.path=5"], "adapter.path: found 5, allowed"),
        (["adapter.path=[a,'']"], "adapter.path: found an empty path"),
        (["adapter.path=a", "adapter.scale=much"], "adapter.scale: found much, allowed: 0 or more"),
        (["adapter.path=a", "adapter.scale=[-1]"], r"adapter.scale: found \[-1\], allowed: 0 or more"),
        (["adapter.scale=[2]"], r"adapter.scale: found \[2\], allowed: 0 or more, of a saved adapter.path"),
        (["adapter.path=a", "adapter.scale=true"], "adapter.scale: found True"),
    ],
)
def test_paths_and_scales_that_do_not_go_together_are_refused(overrides, says):
    with pytest.raises(FairDiffError, match=f"^{says}"):
        composed(*overrides)


def test_whole_numbers_of_a_scale_are_the_same_run():
    one, two = composed("adapter.path=a", "adapter.scale=2"), composed("adapter.path=a", "adapter.scale=2.0")
    assert json.dumps(one.adapter.scale) == json.dumps(two.adapter.scale) == "2.0"
    assert json.dumps(composed().adapter.scale) == "1.0"


def test_a_missing_file_is_one_line():
    with pytest.raises(FairDiffError, match="^adapter.path: no/such.safetensors: no such file$"):
        builder.adapter_fingerprint(composed("adapter.path=no/such.safetensors"))


def test_in_half_precision_factors_stay_float32_and_off_is_the_frozen_model(tiny_folder, file):
    """This includes convolutions, whose factors peft would keep in the precision of the base layer."""
    path, _ = file
    models = [load_model(tiny_folder) for _ in range(3)]
    for model in models[:2]:
        model.lower_precision(torch.bfloat16)
        model.sampling_dtype = torch.bfloat16
    adapter, full = import_lora(models[0], [path], [1.0]), import_lora(models[2], [path], [1.0])
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    on, wanted = picture(models[0], adapter), picture(models[2], full)
    bare = picture(models[1], Bare)
    assert (on - wanted).norm() < 0.3 * (wanted - bare).norm()
    with adapter.off():
        assert torch.equal(picture(models[0], adapter), bare)
