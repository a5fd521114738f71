"""Pictures of every kind are read as what they show, or the reason is said; none of them is a crash."""

import numpy as np
import pytest
from PIL import Image

from classifiers import pictures
from classifiers.detect import MTCNNDetector
from classifiers.pictures import LARGEST, inspect, read_picture

GREY = np.linspace(0, 255, 48 * 40).reshape(48, 40)
COLOUR = np.stack([GREY, GREY[::-1], np.full_like(GREY, 40)], -1).round().astype(np.uint8)


def saved(path, picture, **options):
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff", "ppm", "jp2"])
def test_lossless_files_come_back_as_they_were(tmp_path, kind):
    options = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(kind, {})
    path = saved(tmp_path / f"a.{kind}", COLOUR, **options)
    assert np.array_equal(read_picture(path), COLOUR)
    assert inspect(path).size == (48, 40)


def test_grey_and_black_and_white(tmp_path):
    grey = GREY.round().astype(np.uint8)
    assert np.array_equal(read_picture(saved(tmp_path / "a.png", grey)), np.repeat(grey[..., None], 3, -1))
    two = read_picture(saved(tmp_path / "b.png", Image.fromarray(grey).convert("1")))
    assert set(np.unique(two)) == {0, 255}


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, kind):
    deep = (GREY * 257).round().astype(np.uint16)
    found = read_picture(saved(tmp_path / f"a.{kind}", deep))
    assert np.abs(found[..., 1].astype(float) - GREY).max() <= 0.51
    assert np.asarray(Image.open(tmp_path / f"a.{kind}").convert("RGB")).mean() > 250  # Pillow by itself: white


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path):
    alpha = np.full((48, 40, 1), 255, np.uint8)
    alpha[:24] = 0
    found = read_picture(saved(tmp_path / "a.png", np.concatenate([COLOUR, alpha], -1)))
    assert (found[:24] == 255).all() and np.array_equal(found[24:], COLOUR[24:])
    pale = Image.fromarray(COLOUR).convert("P")
    path = saved(tmp_path / "b.png", pale, transparency=pale.getpixel((0, 0)))
    assert (read_picture(path)[0, 0] == 255).all()


def test_cmyk_is_what_its_inks_show(tmp_path):
    cyan = Image.new("CMYK", (40, 48), (255, 0, 0, 0))
    for kind in ("jpg", "tiff"):
        assert np.abs(read_picture(saved(tmp_path / f"a.{kind}", cyan)).astype(int) - (0, 255, 255)).max() < 4


@pytest.mark.parametrize("orientation,turn", [(3, 2), (6, 1), (8, 3)])
def test_exif_says_which_side_is_up(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.rot90(COLOUR, turn), exif=exif)
    assert np.array_equal(read_picture(path), COLOUR) and inspect(path).size == (48, 40)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (40, 48), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        path = saved(tmp_path / f"a.{kind}", frames[0], save_all=True, append_images=frames[1:], **options)
        assert (read_picture(path) == (255, 0, 0)).all(), kind


def test_a_large_picture_is_reduced_and_a_huge_one_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("RGB", (LARGEST + 1000, 700), "red"))
    assert inspect(path).size == read_picture(path).shape[:2] == (round(700 * LARGEST / (LARGEST + 1000)), LARGEST)
    for limit in (3_000_000, 1_000_000):  # Pillow's warning, and its error at twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="megapixels"):
            read_picture(path)


@pytest.mark.parametrize("kind", ["x.jpg", "x.png", "x.tif"])
def test_a_large_one_is_made_smaller_and_keeps_its_look(tmp_path, kind):
    x, y = np.meshgrid(np.linspace(0, 200, 48), np.linspace(0, 200, 32))
    smooth = np.stack([y + 30, x + 20, x + 10], 2).astype(np.uint8)
    path = saved(tmp_path / kind, Image.fromarray(smooth).resize((1200, 800)))
    found = read_picture(path, 48)
    assert found.shape == (32, 48, 3) and np.abs(found.astype(float) - smooth).mean() < 4
    assert read_picture(path, 5000).shape == (800, 1200, 3)


def test_what_cannot_be_read_has_a_reason(tmp_path):
    def reason(path):
        for read in (read_picture, inspect):
            with pytest.raises(ValueError) as error:
                read(path)
            assert "\n" not in str(error.value)
        return str(error.value)

    whole = saved(tmp_path / "whole.jpg", COLOUR).read_bytes()
    for name, data in {"cut.jpg": whole[: len(whole) // 2], "head.jpg": whole[:20], "text.png": b"no picture"}.items():
        (tmp_path / name).write_bytes(data)
        assert "damaged" in reason(tmp_path / name) or "no picture" in reason(tmp_path / name)
    broken = bytearray(saved(tmp_path / "whole.png", COLOUR).read_bytes())
    broken[60:80] = bytes(20)
    (tmp_path / "broken.png").write_bytes(broken)
    assert "damaged" in reason(tmp_path / "broken.png")
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "an empty file"
    assert reason(tmp_path / "absent.png") == "no such file" and reason(tmp_path) == "no regular file"
    assert "1×1 pixels" in reason(saved(tmp_path / "tiny.png", Image.new("RGB", (1, 1))))
    assert "20×200 pixels" in reason(saved(tmp_path / "narrow.png", Image.new("RGB", (20, 200))))
    assert "32 bits" in reason(saved(tmp_path / "float.tiff", GREY.astype(np.float32)))


def test_the_detector_takes_pictures_of_every_allowed_shape():
    import torch

    detector = MTCNNDetector(input_size=64)
    short = pictures.SMALLEST
    for size in [(short, short), (short, short * pictures.NARROWEST), (short * pictures.NARROWEST, short), (700, 500)]:
        boxes = detector(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
        assert boxes.size == (1, *size)
