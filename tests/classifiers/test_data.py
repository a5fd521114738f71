import numpy as np
import torch
from photos import photo

from classifiers.data import cut, find_faces
from classifiers.detect import MTCNNDetector

PORTRAIT = "data/images/Tom_Hanks_54745.png"


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
