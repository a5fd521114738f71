import pytest
import torch
from torch.nn import functional as F

from classifiers.crop import TEMPLATE_52, align, crop, expand_box, extract, resample
from classifiers.detect import WholeImage
from classifiers.types import Boxes


def image_of(height: int, width: int, batch: int = 2) -> torch.Tensor:
    """x in channel 0, y in channel 1 (pixel centres), smooth noise in channel 2."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    noise = torch.rand(batch, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    noise = F.interpolate(noise, (height, width), mode="bilinear")
    return torch.cat([x.expand(batch, 1, -1, -1), y.expand(batch, 1, -1, -1), noise], 1)


def boxes_of(image: torch.Tensor, rows: list[int], box: list[list[float]], landmark=None) -> Boxes:
    batch, _, height, width = image.shape
    return Boxes(torch.tensor(rows), torch.tensor(box), landmark, (batch, height, width))


@pytest.mark.parametrize("size", [10, 40, 64])
def test_the_whole_image_reproduces_the_resize(size):
    image = image_of(40, 40)
    resized = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(crop(image, WholeImage()(image), size, 1.0), resized)


def test_a_crop_samples_where_the_box_says_on_a_non_square_image():
    image = image_of(30, 50)
    out = crop(image, boxes_of(image, [1], [[30.0, 6.0, 46.0, 22.0]]), 8, 1.0)
    centre = torch.arange(8) * 2 + 1.0
    torch.testing.assert_close(out[0, 0], (30 + centre).expand(8, 8))
    torch.testing.assert_close(out[0, 1], (6 + centre).unsqueeze(1).expand(8, 8))


def test_rows_pick_their_own_image_and_width_and_height_are_not_interchangeable():
    image = image_of(30, 50, batch=3)
    box = [[8.0, 4.0, 20.0, 16.0]]
    for row in (0, 2):
        out = crop(image, boxes_of(image, [row], box), 12, 1.0)
        torch.testing.assert_close(out[0], image[row, :, 4:16, 8:20])
    boxes = Boxes(torch.tensor([0]), torch.tensor(box), None, (3, 50, 30))
    with pytest.raises(ValueError, match="B, H, W"):
        crop(image, boxes, 12)


def test_outside_the_frame_the_edge_is_repeated():
    image = image_of(20, 20)
    inside = crop(image, boxes_of(image, [0], [[0.0, 0.0, 10.0, 10.0]]), 10, 1.0)
    out = crop(image, boxes_of(image, [0], [[-5.0, -5.0, 5.0, 5.0]]), 10, 1.0)
    torch.testing.assert_close(out[:, :, 5:, 5:], inside[:, :, :5, :5])
    torch.testing.assert_close(out[:, :, :5, 5:], inside[:, :, :1, :5].expand(-1, -1, 5, -1))
    far = crop(image, boxes_of(image, [0], [[-90.0, 25.0, -80.0, 35.0]]), 10, 1.0)
    torch.testing.assert_close(far, image[:1, :, -1:, :1].expand(-1, -1, 10, 10))


def test_expand_box_makes_squares_about_the_same_centre():
    box = torch.tensor([[10.0, 20.0, 20.0, 40.0], [0.0, 0.0, 9.0, 3.0]])
    out = expand_box(box, 1.5)
    torch.testing.assert_close((out[:, :2] + out[:, 2:]) / 2, (box[:, :2] + box[:, 2:]) / 2)
    torch.testing.assert_close(out[:, 2:] - out[:, :2], torch.tensor([[30.0, 30.0], [13.5, 13.5]]))


def landmarks_of(points: torch.Tensor, angle: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    turn = torch.polar(torch.tensor(scale), torch.tensor(angle))
    moved = torch.view_as_complex(points.contiguous()) * turn + complex(*shift)
    return torch.view_as_real(moved).unsqueeze(0)


@pytest.mark.parametrize(("angle", "scale"), [(0.0, 1.0), (0.4, 1.0), (-0.7, 3.0), (3.0, 0.6)])
def test_align_moves_the_landmarks_onto_the_template(angle, scale):
    size = 24
    template = torch.tensor(TEMPLATE_52) * size
    image = image_of(120, 140)
    landmark = landmarks_of(template - size / 2, angle, scale, (71.0, 55.0))
    boxes = boxes_of(image, [1], [[50.0, 40.0, 90.0, 70.0]], landmark)
    aligned = align(image, boxes, size)
    # channels 0 and 1 hold the source coordinates: read them at the template's points
    at = (template / size * 2 - 1).view(1, 1, 5, 2)
    found = F.grid_sample(aligned[:, :2], at, align_corners=False)[0, :, 0].T
    torch.testing.assert_close(found, landmark[0], atol=0.02 * scale, rtol=0)


def test_align_without_landmarks_is_the_box():
    image = image_of(32, 32)
    boxes = WholeImage()(image)
    torch.testing.assert_close(align(image, boxes, 16), crop(image, boxes, 16, 1.0))


@pytest.mark.parametrize("kind", ["crop", "align"])
def test_gradient_to_the_pixels_by_finite_differences(kind):
    image = torch.rand(2, 1, 9, 7, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    landmark = landmarks_of(torch.tensor(TEMPLATE_52) * 6 - 3, 0.5, 1.1, (4.0, 4.0))
    boxes = boxes_of(image, [1], [[-1.0, 2.0, 6.0, 11.0]], landmark)
    function = {"crop": lambda x: crop(x, boxes, 4, 1.3), "align": lambda x: align(x, boxes, 5)}[kind]
    torch.autograd.gradcheck(function, image.requires_grad_())
    function(image).sum().backward()
    assert image.grad[0].abs().sum() == 0 and image.grad[1].abs().sum() > 0


def test_a_large_face_is_antialiased():
    stripes = (torch.arange(256) % 2).float().expand(1, 1, 256, 256)
    out = crop(stripes, WholeImage()(stripes), 30, 1.0)
    assert (out[..., 2:-2] - 0.5).abs().max() < 0.1


def test_no_faces_give_empty_crops():
    image = image_of(16, 16)
    boxes = Boxes(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0, 5, 2), (2, 16, 16))
    faces = extract(image, boxes, 8)
    assert faces.crop_FCHW.shape == align(image, boxes, 8).shape == (0, 3, 8, 8)
    assert not faces.found_B.any()


def test_resample_may_change_the_aspect_ratio():
    image = image_of(20, 40)
    out = resample(image, torch.tensor([0]), torch.tensor([[0.0, 0.0, 40.0, 20.0]]), 20)
    torch.testing.assert_close(out, F.interpolate(image[:1], (20, 20), mode="bilinear", antialias=True))
