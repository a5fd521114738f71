import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image

from classifiers.data import cut, find_faces, read_folder
from classifiers.detect import MTCNNDetector

ATTRIBUTES = {"gender": ("female", "male"), "age": ("young", "old")}


@pytest.fixture
def folder(tmp_path):
    for i, (width, height) in enumerate([(20, 20), (40, 20), (20, 40)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10, i] = 200
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder, *lines: str):
    file = folder / "labels.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_reads_labels_by_name_and_cuts_the_middle_square(folder):
    file = write(folder, "age,file,gender", "old,0.png,male", ",1.png,female", "young,2.png,")
    faces = read_folder(folder, file, ATTRIBUTES, 10)
    assert faces.images.shape == (3, 10, 10, 3)
    for i in range(3):
        assert (faces.images[i, 1:-1, 1:-1, i] == 200).all()  # the filter reaches over the cut by a pixel
    assert faces.labels["gender"].tolist() == [1, 0, -1] and faces.labels["age"].tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,gender,age"], "no rows"),
        (["file,gender", "0.png,male"], "column 'age' is absent"),
        (
            ["file,gender,age", "0.png,male,old", "1.png,man,old"],
            "labels.csv:3: gender is 'man', allowed: female, male",
        ),
        (["file,gender,age", "9.png,male,old"], "labels.csv:2: .*9.png: cannot be read"),
    ],
)
def test_a_wrong_table_is_one_line_naming_file_and_line(folder, lines, message):
    with pytest.raises(ValueError, match=message):
        read_folder(folder, write(folder, *lines), ATTRIBUTES, 10)


def test_find_faces_gives_the_rows_and_boxes_a_judge_crops():
    portrait = photo("insightface", "data/images/Tom_Hanks_54745.png")
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
