"""Zero-shot judges on a tiny random open_clip model saved to a folder."""

import json

import open_clip
import pytest
import torch
from photos import piece
from PIL import Image
from tiny_judges import MODEL, PIXELS, save_open_clip
from torch.nn import functional as F

from classifiers.zeroshot import load_open_clip, load_zero_shot

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


def test_a_folder_without_weights_is_never_filled_at_random(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PIXELS}))
    with pytest.raises(ValueError, match=r"^path: .*cannot load an open_clip model") as error:
        load_open_clip(tmp_path)
    assert "\n" not in str(error.value)
