"""A judge's answers to files: what cannot be read or shows nobody is counted, and broken-off work goes on bit by bit."""

from functools import partial

import numpy as np
import pytest
from photos import photo
from PIL import Image

from classifiers import judging
from classifiers.detect import MTCNNDetector, WholeImage
from classifiers.judging import FACE, NO_FACE, UNREADABLE, judge_files, largest_face
from classifiers.pictures import read_picture


class Mean:
    """Logits: the mean of red, of green, of blue."""

    attributes = {"gender": ("female", "male"), "hat": ("with",)}

    def __call__(self, crop_FCHW):
        mean_F3 = crop_FCHW.mean((2, 3))
        return {"gender": mean_F3[:, :2], "hat": mean_F3[:, 2:]}


@pytest.fixture
def files(tmp_path):
    """Seventy flat pictures of different colours and sizes; one that is cut short, one that is missing, one too small."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(70):
        names.append(tmp_path / f"{i}.png")
        height, width = rng.integers(20, 60, 2)
        Image.new("RGB", (int(width), int(height)), tuple(map(int, rng.integers(0, 256, 3)))).save(names[-1])
    names[7].write_bytes(names[7].read_bytes()[:40])
    names[40] = tmp_path / "nowhere.png"
    Image.new("RGB", (300, 4)).save(names[66])
    return names


LOOK = partial(largest_face, detector=WholeImage(), crop_size=8, expand=1.0, device="cpu")


def test_every_file_has_its_own_answer_in_order(files, tmp_path):
    *_, known = judge_files(files, LOOK, Mean(), tmp_path / "part", "one")
    assert known.counts() == {"found": 67, "not_found": 0, "unreadable": 3}
    assert [known.found_N[i] for i in (7, 40, 66)] == [UNREADABLE, UNREADABLE, UNREADABLE]
    for i in np.flatnonzero(known.found_N == FACE):
        colour = read_picture(files[i])[0, 0] / 255
        np.testing.assert_allclose(known.logits_NK[i], colour, atol=1e-5)
    assert np.isnan(known.logits_NK[[7, 40, 66]]).all()
    logits = known.logits(Mean.attributes)
    assert logits["gender"].shape == (67, 2) and logits["hat"].shape == (67, 1)
    assert str(known) == "67 faces of 70 pictures; 3 unreadable"


def test_broken_off_it_goes_on_and_ends_with_the_same_bits(files, tmp_path):
    *_, whole = judge_files(files, LOOK, Mean(), tmp_path / "whole", "one")
    work = judge_files(files, LOOK, Mean(), tmp_path / "part", "one")
    next(work), next(work)  # nothing, one block
    work.close()  # as Ctrl-C does
    looked = []
    again = judge_files(files, lambda file: looked.append(file) or LOOK(file), Mean(), tmp_path / "part", "one")
    *_, known = again
    assert looked == files[judging.BLOCK :]
    np.testing.assert_array_equal(known.logits_NK, whole.logits_NK)
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    assert next(judge_files(files, LOOK, Mean(), tmp_path / "part", "two")).done == 0  # of another request
    (tmp_path / "part").write_bytes(b"cut short")
    assert next(judge_files(files, LOOK, Mean(), tmp_path / "part", "one")).done == 0


def test_logits_that_are_not_finite_are_refused(files, tmp_path):
    class Broken(Mean):
        def __call__(self, crop_FCHW):
            return {name: logits / 0 for name, logits in super().__call__(crop_FCHW).items()}

    with pytest.raises(ValueError, match="not finite"):
        list(judge_files(files, LOOK, Broken(), tmp_path / "part", "one"))


def test_a_photographed_face_is_cut_alike_from_every_kind_of_file(tmp_path):
    pixels = (photo("skimage", "data/astronaut.png")[0].permute(1, 2, 0) * 255).round().byte().numpy()
    portrait = Image.fromarray(pixels)
    portrait.save(tmp_path / "jpeg.jpg", quality=90)
    portrait.convert("CMYK").save(tmp_path / "cmyk.tif")
    portrait.resize((1600, 1600)).save(tmp_path / "huge.jpg")
    portrait.resize((200, 200)).save(tmp_path / "small.png")
    look = partial(largest_face, detector=MTCNNDetector(input_size=160), crop_size=48, expand=1.6, device="cpu")
    crops = {}
    for name in ("jpeg.jpg", "cmyk.tif", "huge.jpg", "small.png"):
        kind, crops[name] = look(tmp_path / name)
        assert kind == FACE and crops[name].shape == (1, 3, 48, 48), name
    for name, piece in crops.items():
        assert (piece - crops["jpeg.jpg"]).abs().mean() < 0.06, name
    Image.new("RGB", (2500, 2500), "grey").save(tmp_path / "nobody.png")
    assert look(tmp_path / "nobody.png")[0] == NO_FACE


def test_people_of_the_openpeople_wheel_have_one_face_each(tmp_path):
    """Portraits of made-up people, MIT: the studio ones face the camera, the sheets show one person many times."""
    detector = MTCNNDetector(input_size=160)
    portraits = [photo("openpeople", f"data/curated/P00{i}/assets/studio_portrait.jpg") for i in (1, 2, 3)]
    assert [detector(image_1CHW).count_F.tolist() for image_1CHW in portraits] == [[1]] * 3
    sheet = photo("openpeople", "data/curated/P001/assets/emotions_sheet.jpg")
    assert MTCNNDetector(input_size=400)(sheet).count_F.item() >= 4
