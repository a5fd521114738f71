import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image

from classifiers.data import cut, find_faces, read_image
from classifiers.detect import MTCNNDetector

PORTRAIT = "data/images/Tom_Hanks_54745.png"


@pytest.fixture
def picture() -> Image.Image:
    """A smooth picture, lighter to the right and redder downwards, so that JPEG changes it little."""
    x, y = np.meshgrid(np.linspace(0, 200, 48), np.linspace(0, 200, 32))
    return Image.fromarray(np.stack([y + 30, x + 20, x + 10], 2).astype(np.uint8))


def deep(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def transparent(picture: Image.Image) -> Image.Image:
    """The left half is there, the right half is not, whatever colours lie under it."""
    alpha = np.where(np.arange(48) < 24, 255, 0).astype(np.uint8)
    picture.putalpha(Image.fromarray(np.tile(alpha, (32, 1))))
    return picture


def turned(picture: Image.Image) -> Image.Image:
    """As a camera on its side stores it, with a note of that."""
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    return stored


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("grey.png", lambda p: p.convert("L")),
        ("grey_alpha.png", lambda p: p.convert("LA")),
        ("palette.gif", lambda p: p.quantize(64)),
        ("cmyk.jpg", lambda p: p.convert("CMYK")),
        ("cmyk.tif", lambda p: p.convert("CMYK")),
        ("sixteen.png", deep),
        ("sixteen.tif", deep),
        ("webp.webp", lambda p: p),
        ("turned.jpg", turned),
    ],
)
def test_whatever_a_file_stores_comes_out_as_upright_rgb(tmp_path, picture, kind, make):
    stored = make(picture)
    more = {"exif": stored.getexif()} if kind == "turned.jpg" else {}
    stored.save(tmp_path / kind, **more)
    found = read_image(tmp_path / kind)
    grey = kind.startswith(("grey", "sixteen"))
    wanted = np.asarray(picture.convert("L").convert("RGB") if grey else picture, float)
    assert found.mode == "RGB" and found.size == picture.size
    tolerance = 12 if kind.endswith((".gif", ".jpg", ".webp")) else 1  # a palette and JPEG lose some
    assert np.abs(np.asarray(found, float) - wanted).mean() <= tolerance


def test_transparent_pixels_are_white(tmp_path, picture):
    transparent(picture).save(tmp_path / "x.png")
    found = np.asarray(read_image(tmp_path / "x.png"))
    assert (found[:, 24:] == 255).all() and (found[:, :24] == np.asarray(picture)[:, :24, :3]).all()


def test_an_animation_is_its_first_picture(tmp_path, picture):
    other = Image.new("RGB", picture.size, "black")
    picture.save(tmp_path / "x.gif", save_all=True, append_images=[other, other])
    assert np.abs(np.asarray(read_image(tmp_path / "x.gif"), float) - np.asarray(picture)).mean() < 12


@pytest.mark.parametrize("kind", ["x.jpg", "x.png", "x.tif"])
def test_a_large_one_is_made_smaller_and_keeps_its_look(tmp_path, picture, kind):
    picture.resize((1200, 800)).save(tmp_path / kind)
    found = read_image(tmp_path / kind, 48)
    assert found.size == (48, 32)
    assert np.abs(np.asarray(found, float) - np.asarray(picture)).mean() < 4
    assert read_image(tmp_path / kind, 5000).size == (1200, 800)


@pytest.mark.parametrize("kind", ["x.jpg", "x.png"])
def test_a_file_cut_short_is_an_error_not_half_a_picture(tmp_path, picture, kind):
    picture.save(tmp_path / kind)
    whole = (tmp_path / kind).read_bytes()
    (tmp_path / kind).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError):
        read_image(tmp_path / kind)


def test_find_faces_gives_the_rows_and_boxes_a_judge_crops():
    portrait = photo("insightface", PORTRAIT)
    picture = torch.nn.functional.interpolate(portrait, (64, 64), mode="area")
    picture = (picture[0].permute(1, 2, 0) * 255).byte().numpy()
    images = np.stack([np.full_like(picture, 90), picture, picture[:, ::-1], np.full_like(picture, 9)])
    rows, boxes = find_faces(images, MTCNNDetector(), batch=3)
    assert rows.tolist() == [1, 2] and boxes.shape == (2, 4)
    crops = cut(images[rows], boxes, 24)
    torch.testing.assert_close(crops[0], crops[1].flip(-1), atol=0.2, rtol=0)
    torch.testing.assert_close(
        cut(images[1:2], None, 64), torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    )
