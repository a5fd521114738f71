"""Zero-shot judges on a tiny random open_clip model saved to a folder."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from photos import piece
from PIL import Image
from tiny_judges import MODEL, PIXELS, change_tensor, save_open_clip
from torch.nn import functional as F

from classifiers.zeroshot import load_open_clip, load_zero_shot, split_wordings

CLASSES = {"gender": ("female", "male"), "age": ("young", "old")}
MAPPING = {
    "gender": {"female": ["a photo of a woman", "a woman"], "male": ["a photo of a man"]},
    "age": {"old": ["an old person"], "young": ["a young person"]},
    "race": {"Black": ["a Black person"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_open_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def judge(folder):
    return load_zero_shot(folder, MAPPING, CLASSES)


def test_preprocessing_is_open_clips_own(folder):
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = piece(80, 80)[0]
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    ours = load_open_clip(folder)[2](image[None])[0]
    assert (ours - theirs(picture)).abs().max() <= 2 / 255 / min(PIXELS["std"])


def test_logits_are_scaled_cosines_to_the_mean_direction_of_the_prompts(folder, judge):
    model, tokenizer, pixels = load_open_clip(folder)
    crops = piece(48, 48)
    image = F.normalize(model.encode_image(pixels(crops)), dim=1)
    female = F.normalize(model.encode_text(tokenizer(MAPPING["gender"]["female"])), dim=1).mean(0)
    by_hand = image @ F.normalize(female, dim=0) * model.logit_scale.exp()
    torch.testing.assert_close(judge(crops)["gender"][:, 0], by_hand)
    old = F.normalize(model.encode_text(tokenizer(["an old person"])), dim=1)[0]
    torch.testing.assert_close(judge(crops)["age"][:, 1], image @ old * model.logit_scale.exp())  # the wanted order


def test_frozen_and_differentiable_row_by_row(judge):
    crops = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    judge(crops)["age"][2, 0].backward()
    assert (crops.grad.abs().sum((1, 2, 3)) > 0).tolist() == [False, False, True]
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert judge(crops[:0])["age"].shape == (0, 2) and judge.attributes == CLASSES


def test_other_prompts_are_another_judge(folder, judge):
    other = load_zero_shot(folder, MAPPING | {"age": {"old": ["a grandparent"], "young": ["a young person"]}}, CLASSES)
    assert other.config != judge.config and not torch.equal(other.text_age, judge.text_age)


def test_wordings_are_equal_parts_of_each_list():
    prompts = {"a": ["a1", "a2"], "b": ["b1", "c1", "b2", "c2"], "c": ["d1", "d2", "d3"]}
    assert split_wordings(prompts, ("c", "b", "a")) == [
        {"c": ["d1", "d2"], "b": ["b1", "c1"], "a": ["a1"]}, {"c": ["d3"], "b": ["b2", "c2"], "a": ["a2"]}
    ]  # fmt: skip


def test_the_default_words_have_as_many_wordings_in_each_class():
    mapping = yaml.safe_load((Path(__file__).parents[2] / "conf/judge/open_clip.yaml").read_text())["mapping"]
    for name, classes in mapping.items():
        parts = split_wordings(classes, tuple(classes))
        assert len(parts) > 2 and {len(prompts) % len(parts) for prompts in classes.values()} == {0}, name
        for part in parts:  # of one wording: the same words around another group
            words = [set.intersection(*(set(p.replace(" an ", " a ").split()) for p in some)) for some in part.values()]
            assert words[0] & words[1], part


def test_single_wordings_are_no_part_of_what_a_judge_answers(folder):
    """The same weights and answers as before they were compared, so that no cache of it is made anew."""
    words = {"female": ["a woman", "she"], "male": ["a man", "he"]}
    judge = load_zero_shot(folder, {"gender": words}, {"gender": CLASSES["gender"]})
    assert len(judge.wordings["gender"]) == 2 and not [key for key in judge.state_dict() if "wording" in key]
    assert set(judge.config) == {"pixels", "prompts"}
    crops = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for j, part in enumerate(judge.wordings["gender"]):
        alone = load_zero_shot(folder, {"gender": part}, {"gender": CLASSES["gender"]})
        assert torch.equal(judge.labels_by_wording(crops)["gender"][:, j], alone(crops)["gender"].argmax(1))


@pytest.mark.parametrize(
    ("path", "mapping", "message"),
    [
        (None, MAPPING, "^path: found null"),
        ("nowhere", MAPPING, "^path: found nowhere, allowed: a folder with open_clip_config.json"),
        ("ViT-B-32/no_such_tag", MAPPING, r"^path: found ViT-B-32/no_such_tag, allowed: .*laion2b_s34b_b79k"),
        ("here", MAPPING | {"age": {"old": ["x"]}}, "^mapping.age.young: found nothing"),
        (
            "here",
            MAPPING | {"age": {"old": ["x"], "young": ["y"], "z": ["z"]}},
            "^mapping.age: found z, allowed: young",
        ),
    ],
)
def test_bad_input_is_one_line(folder, path, mapping, message):
    with pytest.raises(ValueError, match=message) as error:
        load_zero_shot(folder if path == "here" else path, mapping, CLASSES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("preprocess_cfg", {"mean": [0.5]}, "preprocess_cfg: found .*three numbers"),
        ("preprocess_cfg", {"mean": 0.5}, "preprocess_cfg: "),
        ("preprocess_cfg", {"std": [0, 1, 1]}, "preprocess_cfg: found .*std above 0"),
        ("preprocess_cfg", {"interpolation": "nearest"}, "preprocess_cfg: found interpolation nearest"),
        ("model_cfg", {"embed_dim": "wide"}, "cannot load an open_clip model"),
        ("model_cfg", {"text_cfg": MODEL["text_cfg"] | {"context_length": 2}}, "read alike, allowed: .*none longer than"),
    ],
)
def test_a_configuration_of_the_wrong_kind_is_one_line(part, changes, message, tmp_path):
    save_open_clip(tmp_path)
    about = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about | {part: about[part] | changes}))
    with pytest.raises(ValueError, match=message) as error:
        load_zero_shot(str(tmp_path), MAPPING, CLASSES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * float("nan"), "holds NaN or infinity"),
        (lambda t: t.to(torch.complex64), "is complex, allowed: real"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(change, message, tmp_path):
    save_open_clip(tmp_path)
    change_tensor(tmp_path / "open_clip_model.safetensors", "visual.conv1.weight", change)
    with pytest.raises(ValueError, match=f"^path: .*visual.conv1.weight {message}"):
        load_open_clip(tmp_path)


def test_a_folder_without_weights_is_never_filled_at_random(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PIXELS}))
    with pytest.raises(ValueError, match=r"^path: .*cannot load an open_clip model") as error:
        load_open_clip(tmp_path)
    assert "\n" not in str(error.value)
