"""scripts/build_bank.py: it builds a face bank from images, resumes after an interruption and lists what it left out."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import composed
from torch.nn import functional as F

from classifiers import bank as bank_module
from classifiers.data import to_float
from classifiers.identity import Bank, read_rows
from classifiers.pictures import read_picture
from fairdiff import builder
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_bank  # noqa: E402

SIDE, FACES = 64, 6  # of a rendered person in docs/images/renders.jpg; how many of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write images of six people, one of two people, one without people, a damaged image and a text file."""
    folder = tmp_path_factory.mktemp("faces")
    with Image.open(ROOT / "docs" / "images" / "renders.jpg") as sheet:
        for i in range(FACES):
            sheet.crop((i * SIDE, 0, (i + 1) * SIDE, SIDE)).save(folder / f"{i}.png")
        (folder / "more").mkdir()
        sheet.crop((0, 0, 2 * SIDE, SIDE)).save(folder / "more" / "two.png")
    Image.new("L", (SIDE, SIDE), 128).save(folder / "more" / "nobody.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (folder / "notes.txt").write_text("no picture")
    return folder


def call(capsys, *args: object) -> tuple[int, str, str]:
    try:
        build_bank.main([str(a) for a in args])
        code = 0
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_keeps_each_face_that_the_detector_finds_and_counts_the_rest(folder, tmp_path, capsys):
    file = tmp_path / "faces.safetensors"
    code, out, _ = call(capsys, folder, f"features.bank={file}")
    last = f"{file}: {FACES} faces of 9 pictures; left out: 1 unreadable, 1 with several faces, 1 without a face"
    assert code == 0 and out.splitlines()[-1] == last
    assert [path.name for path in tmp_path.iterdir()] == ["faces.safetensors"]

    config = composed(f"features.bank={file}")
    perception = builder.build_perception(config, make_plan(config))
    for i in range(FACES):  # a picture's face, looked at as in training, is at distance 0 from its own row
        image = to_float(read_picture(folder / f"{i}.png")[None])
        embedding = perception.embed(perception.align(perception.classify_faces(image)))
        nearest = perception.bank.nearest(embedding)
        torch.testing.assert_close(nearest, perception.bank.embedding_ND[i : i + 1])
        assert 1 - F.cosine_similarity(nearest, embedding).item() < 1e-5

    assert call(capsys, folder, f"features.bank={file}")[:2] == (0, f"{file}: {FACES} faces, made before\n")
    code, _, err = call(capsys, folder / "more", f"features.bank={file}")
    assert code == 2 and "made from other pictures" in err and err.count("\n") == 1


def test_a_bank_made_twice_or_after_breaks_is_the_same_bits(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bank_module, "KEEP_EVERY", 2)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert call(capsys, folder, f"features.bank={whole}")[0] == 0
    looked_at, embed = [], bank_module.embedding_of

    def until_killed(file, **tools):
        looked_at.append(file.name)
        if len(looked_at) in (4, 8):
            raise KeyboardInterrupt
        return embed(file, **tools)

    monkeypatch.setattr(build_bank, "embedding_of", until_killed)
    for _ in range(2):
        code, _, err = call(capsys, folder, f"features.bank={broken}")
        assert code == 130 and err == "interrupted; the same command goes on\n" and not broken.exists()
    assert call(capsys, folder, f"features.bank={broken}")[0] == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert len(looked_at) < 9 + 2 * 2 + 1  # of each break at most two pictures and the one it came in


def test_a_damaged_part_and_one_of_other_settings_are_begun_anew(folder, tmp_path, monkeypatch):
    files = bank_module.pictures_in(folder)

    def looks(request):
        *_, known = bank_module.collect(files, lambda file: torch.ones(3), tmp_path / "x.part", request, 3)
        return known

    first = bank_module.collect(files, lambda file: torch.zeros(3), tmp_path / "x.part", "one", 3)
    monkeypatch.setattr(bank_module, "KEEP_EVERY", 1)
    next(first), next(first), next(first)
    assert torch.stack(looks("two").rows).sum() == 3 * 9  # nothing of the other's
    (tmp_path / "x.part").write_bytes(b"cut short")
    assert looks("two").done == 9


def test_the_bank_of_another_embedder_is_one_line(folder, tmp_path, capsys):
    file = tmp_path / "faces.safetensors"
    call(capsys, folder / "more", f"features.bank={file}")  # nobody alone there: no bank
    assert not file.exists()
    torch.save({}, file)
    code, _, err = call(capsys, folder, f"features.bank={file}")
    assert code == 2 and "is there and no bank" in err
    file.unlink()
    call(capsys, folder, f"features.bank={file}")
    maker = read_rows(file)[1]["embedder"]
    config = composed(f"features.bank={file}", "features.identity=fairdiff/portraits/weights/encoder")
    with pytest.raises(FairDiffError, match=f"features.bank: .*faces.safetensors: made by the embedder {maker}"):
        builder.build_bank(config, builder.build_embedder(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["features.bank=null"], "features.bank: found null, allowed: the file to be made"),
        (["features.bank={new}", "features.identity=null"], "features.identity: found null, allowed: a face embedder"),
        (["features.bank={new}", "features.bnk=1"], "features.bnk: there is no such key; allowed: features.bank"),
        (["features.bank={new}", "model=sd15"], "model.device: "),
    ],
)
def test_what_cannot_be_is_one_line(settings, message, folder, tmp_path, capsys):
    code, _, err = call(capsys, folder, *(s.replace("{new}", str(tmp_path / "new.safetensors")) for s in settings))
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    (tmp_path / "empty").mkdir(exist_ok=True)
    code, _, err = call(capsys, tmp_path / "empty", f"features.bank={tmp_path}/new.safetensors")
    assert code == 2 and "found no pictures" in err


def test_where_a_run_looks_for_its_bank(tmp_path):
    weights = tmp_path / "arcface.pth"
    weights.touch()
    for identity in (weights, "facebook/dinov2-base"):
        with pytest.raises(FairDiffError, match="features.bank: found null and no bank.safetensors beside .*build_bank"):
            builder.bank_file(composed(f"features.identity={identity}"))
    (tmp_path / "bank.safetensors").touch()
    assert builder.bank_file(composed(f"features.identity={weights}")) == tmp_path / "bank.safetensors"
    assert builder.bank_file(composed()).parent.name == "identity"


def test_the_identity_of_a_run_holds_the_faces_of_the_bank_and_not_its_name(tiny_folder):
    config = composed(f"model.path={tiny_folder}")
    plan, model = make_plan(config), builder.build_model(config)
    perception = builder.build_perception(config, plan)
    named = composed(f"model.path={tiny_folder}", "features.bank=elsewhere.safetensors")
    one = builder.training_fingerprint(config, plan, model, perception)
    assert builder.training_fingerprint(named, plan, model, perception) == one
    perception.bank = Bank(perception.bank.embedding_ND[1:])
    assert builder.training_fingerprint(config, plan, model, perception) != one
