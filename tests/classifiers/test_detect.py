from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import photo
from torch.nn import functional as F

from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage, largest, suppress, suppress_nested


@pytest.fixture(scope="module")
def group():
    """Six people, 886 x 1280, at half size."""
    return F.interpolate(photo("insightface", "data/images/t1.jpg"), scale_factor=0.5, mode="area")


@pytest.fixture(scope="module")
def portrait():
    return photo("insightface", "data/images/Tom_Hanks_54745.png")


def noise(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_every_person_of_a_real_photograph_is_found_and_the_largest_kept(group):
    detector = MTCNNDetector(input_size=None, min_face=20)
    row_N, box_N4, landmark_N52 = detector.cascade(group * 2 - 1)
    assert len(row_N) >= 6
    boxes = detector(group)
    side_N = (box_N4[:, 2:] - box_N4[:, :2]).prod(1)
    torch.testing.assert_close(boxes.box_F4[0], box_N4[side_N.argmax()], atol=0.5, rtol=0)
    left_N, right_N = landmark_N52[:, 0], landmark_N52[:, 1]
    inside = (landmark_N52 > box_N4[:, None, :2]) & (landmark_N52 < box_N4[:, None, 2:])
    assert inside.float().mean() > 0.95
    assert (left_N[:, 0] < right_N[:, 0]).all() and (landmark_N52[:, 3, 1] > landmark_N52[:, 2, 1]).all()


def test_no_face_is_no_row_and_not_an_error():
    detector = MTCNNDetector()
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    image = torch.cat([noise(3, 64, 64), torch.full((2, 3, 64, 64), 0.5), ramp[None]])
    boxes = detector(image)
    assert len(boxes.row_F) == 0 and boxes.box_F4.shape == (0, 4) and boxes.landmark_F52.shape == (0, 5, 2)
    assert boxes.found_B.tolist() == [False] * 6 and boxes.size == (6, 64, 64)
    assert len(detector(noise(2, 10, 10)).row_F) == 0


def test_an_image_gets_the_same_answer_in_every_batch(portrait):
    detector = MTCNNDetector()
    picture = F.interpolate(portrait, (64, 64), mode="area")
    shifted = picture.roll((3, -2), (2, 3))
    image = torch.cat([noise(2, 64, 64), picture, noise(70, 64, 64), shifted])
    boxes = detector(image)
    assert boxes.row_F.tolist() == [2, 73]
    for row, one in ((0, picture), (1, shifted)):
        alone = detector(one)
        torch.testing.assert_close(boxes.box_F4[row], alone.box_F4[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(boxes.landmark_F52[row], alone.landmark_F52[0], atol=1e-3, rtol=0)
    again = detector(image)
    assert torch.equal(boxes.box_F4, again.box_F4)


def test_boxes_are_in_pixels_of_the_given_image_also_when_it_is_not_square(portrait):
    detector = MTCNNDetector(input_size=80)
    small = F.interpolate(portrait, (96, 96), mode="area")
    wide = F.pad(small, (60, 20, 0, 0), value=0.5)
    tall = F.pad(small, (0, 0, 60, 20), value=0.5)
    middle = [(b[:, :2] + b[:, 2:]) / 2 for b in (detector(x).box_F4 for x in (small, wide, tall))]
    torch.testing.assert_close(middle[1] - middle[0], torch.tensor([[60.0, 0.0]]), atol=2.5, rtol=0)
    torch.testing.assert_close(middle[2] - middle[0], torch.tensor([[0.0, 60.0]]), atol=2.5, rtol=0)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(detector(large).box_F4 / 2, detector(small).box_F4, atol=1.5, rtol=0)


def test_a_mirrored_picture_has_mirrored_landmarks(portrait):
    detector = MTCNNDetector(input_size=None)
    small = F.interpolate(portrait, (96, 96), mode="area")
    plain, mirrored = detector(small).landmark_F52, detector(small.flip(-1)).landmark_F52
    back = torch.stack([96 - mirrored[..., 0], mirrored[..., 1]], -1)[:, [1, 0, 2, 4, 3]]
    torch.testing.assert_close(back, plain, atol=2.5, rtol=0)


def test_suppression_keeps_images_apart_and_the_best_score():
    row = torch.tensor([0, 0, 1, 0])
    box = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [2.0, 2, 6, 6]])
    score = torch.tensor([0.8, 0.9, 0.7, 0.6])
    assert sorted(suppress(row, box, score, 0.5).tolist()) == [1, 2, 3]
    assert sorted(suppress_nested(row, box, score, 0.5).tolist()) == [1, 2]
    assert largest(row, box).tolist() == [0, 2]
    assert largest(row[:0], box[:0]).tolist() == []


def test_whole_image_is_one_face_each():
    boxes = WholeImage()(noise(3, 20, 30))
    assert boxes.row_F.tolist() == [0, 1, 2] and boxes.box_F4.tolist() == [[0, 0, 30, 20]] * 3
    assert boxes.found_B.all() and boxes.landmark_F52 is None


def test_insightface_without_its_models_says_which_folder(tmp_path):
    pytest.importorskip("insightface")
    for content in (None, b"no model"):
        if content:
            (tmp_path / "models/buffalo_l").mkdir(parents=True)
            (tmp_path / "models/buffalo_l/det_10g.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="models/buffalo_l") as error:
            InsightFaceDetector(tmp_path)
        assert "\n" not in str(error.value)


def test_insightface_sees_each_picture_in_its_colours_and_answers_with_the_largest_face():
    """All that lies around insightface's own network, whose weights are not to be had here."""
    seen = []

    def face(left, side):
        kps = np.array([[left + k, 2 * k] for k in range(5)], np.float32)
        return SimpleNamespace(bbox=np.array([left, 1, left + side, 1 + side], np.float32), kps=kps)

    def get(picture):
        seen.append(picture)
        return [face(2, 5), face(3, 9), face(8, 4)] if picture[0, 0, 2] > 0 else []

    detector = InsightFaceDetector.__new__(InsightFaceDetector)
    detector.app = SimpleNamespace(get=get)
    image = torch.zeros(3, 3, 12, 16)
    image[1, 0], image[2, 0], image[2, 2] = 1.0, 0.5, 0.25  # red; and half of it with a quarter of blue
    boxes = detector(image)
    assert [p.shape for p in seen] == [(12, 16, 3)] * 3 and seen[2][5, 5].tolist() == [64, 0, 128]  # blue, green, red
    assert boxes.row_F.tolist() == [1, 2] and boxes.size == (3, 12, 16)
    assert boxes.box_F4.tolist() == [[3, 1, 12, 10]] * 2
    assert boxes.landmark_F52[0].tolist() == [[3 + k, 2 * k] for k in range(5)]
    nobody = detector(torch.zeros(2, 3, 12, 16))
    assert nobody.row_F.tolist() == [] and nobody.landmark_F52.shape == (0, 5, 2)
