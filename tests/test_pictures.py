"""Given images use the same judge, records, metrics and report as generated ones, and no generating model is loaded."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from json_schema import closed, faults
from PIL import Image

from fairdiff import builder
from fairdiff.audit.records import load_records, probability_columns
from fairdiff.audit.schema import schema
from fairdiff.cli.compose import composed
from fairdiff.cli.main import main
from fairdiff.errors import FairDiffError, NotWithinMargin
from fairdiff.jobs import audit_command, audit_job, train_job
from fairdiff.pictures import read_pictures

PROMPTS = [f"a photo of the face of a {subject}, a person" for subject in ("nurse", "carpenter")]
EACH = 6
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shown() -> dict[str, np.ndarray]:
    """Pictures that Portraits generated, uint8 [EACH, 64, 64, 3] of each prompt: mostly women; women, then as many men."""
    sheet = np.asarray(Image.open(ROOT / "docs" / "images" / "generated.jpg").convert("RGB"))
    tiles = [sheet[:64, x : x + 64] for x in range(0, 1024, 64)] + [sheet[64:128, x : x + 64] for x in range(0, 1024, 64)]
    return {PROMPTS[0]: np.stack(tiles[:EACH]), PROMPTS[1]: np.stack(tiles[12:15] + tiles[16:19])}


@pytest.fixture
def no_model(monkeypatch):
    """Make any loading of a generating model fail."""

    def refuse(*_):
        raise AssertionError("a model that generates is loaded")

    monkeypatch.setattr(builder, "build_model", refuse)
    monkeypatch.setattr("fairdiff.diffusion.load.load_model", refuse)


def folders(root: Path, shown: dict[str, np.ndarray]) -> Path:
    """Write a sub-folder with the images of each prompt."""
    for text, images in shown.items():
        (root / text).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / text / f"{i}.png")
    return root


def manifest(file: Path, rows: list[dict]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    return file


def audit(folder: Path, *overrides: str) -> tuple[dict, pd.DataFrame]:
    config, _ = composed(["cache=null", *overrides])
    audit_job(config, folder)
    (where,) = (folder / "audits").iterdir()
    return json.loads((where / "audit.json").read_text("utf-8")), load_records(where / "records.parquet")


def test_a_folder_for_each_prompt_needs_no_model(shown, tmp_path, no_model, capsys):
    root = folders(tmp_path / "given", shown)
    (root / PROMPTS[0] / "notes.txt").write_text("no picture")
    found, records = audit(tmp_path / "run", f"images={root}", "model.path=nowhere")
    assert found["prompts"] == 2 and found["images_per_prompt"] == EACH and [*found["models"]] == ["before"]
    assert set(records.prompt) == {*PROMPTS} and len(records) == 2 * EACH and records.found.mean() > 0.8
    assert records[["clip_t", "between"]].notna().all(axis=None) and records.clip_i.isna().all()
    assert found["models"]["before"]["attributes"]["gender"]["corrected"]["bias"]["mean"] is not None  # as for our own
    assert found["provenance"]["pictures_unreadable"] == {} and "guidance" not in found["provenance"]
    page = next((tmp_path / "run").glob("audits/*/report.html")).read_text("utf-8")
    assert f"{2 * EACH} pictures, {EACH} to {EACH} of each prompt" in page
    assert "the embedded judge has only seen renders" in capsys.readouterr().out
    again, _ = audit(tmp_path / "run", f"images={root}", "model.path=nowhere")
    assert again == found and "this audit is finished" in capsys.readouterr().out


def test_a_calibration_of_other_crops_is_declined_and_the_page_says_why_in_red(shown, tmp_path, no_model):
    """The images are face crops. Without audit.calibration=none the audit is refused, and the error names this option."""
    given = [f"images={folders(tmp_path / 'given', shown)}", "detector=whole", "detector.crop_size=64"]
    with pytest.raises(FairDiffError, match=r"detector\.type=mtcnn, found whole.*audit\.calibration=none"):
        audit(tmp_path / "run", *given)
    found, _ = audit(tmp_path / "run", *given, "audit.calibration=none")
    why = "the calibration of this judge was declined (audit.calibration=none): it was measured with type=mtcnn, not whole, "
    why += "expand=1.6, not 1.0"
    entry = found["models"]["before"]["attributes"]["gender"]
    assert found["judge"]["not_corrected"] == why and "corrected" not in entry and not entry["target"]["corrected"]
    (where,) = (tmp_path / "run" / "audits").iterdir()
    assert f'<p class="small beyond">Not corrected: {why}.</p>' in (where / "report.html").read_text("utf-8")
    assert "not corrected" in (where / "summary.md").read_text("utf-8")
    assert not faults(found, closed(schema()), closed(schema()))


def test_labels_do_not_depend_on_the_manifest_the_batches_or_the_format(shown, tmp_path, no_model):
    _, one = audit(tmp_path / "one", f"images={folders(tmp_path / 'given', shown)}")
    rows = []
    for text, images in shown.items():
        for i, image in enumerate(images):
            name = f"{len(rows)}.{['webp', 'bmp'][i % 2]}"
            Image.fromarray(image).save(tmp_path / name, lossless=True)
            rows.append({"prompt": text, "image": name, "subject": text[:5], "seed": i})
    file = manifest(tmp_path / "m.csv", rows)
    _, two = audit(tmp_path / "two", f"images={tmp_path}", f"manifest={file}", "micro_batch=1")
    one = one.sort_values(["prompt", "image_index"]).reset_index(drop=True)
    two = two.sort_values(["prompt", "image_index"]).reset_index(drop=True)
    columns = ["found", "x0", "y1", "clip_t", "between", *one.columns[one.columns.str.startswith("p.")]]
    pd.testing.assert_frame_equal(one[columns], two[columns], rtol=1e-3, atol=1e-3)


def test_pictures_of_any_size_and_kind_in_one_folder(shown, tmp_path, no_model):
    """An enlarged, EXIF-rotated, transparent, grey, 16-bit or padded image of the same face has the same class."""
    root = folders(tmp_path / "given", shown)
    for text, images in shown.items():
        (tmp_path / "odd" / text).mkdir(parents=True)
        for i, image in enumerate(images):
            picture, path = Image.fromarray(image), tmp_path / "odd" / text / f"{i}.png"
            exif = Image.Exif()
            exif[0x0112] = 3
            match i % 4:
                case 0:
                    picture.resize((192, 192), Image.Resampling.BICUBIC).save(path)
                case 1:
                    picture.rotate(180).save(path, exif=exif)
                case 2:
                    picture.convert("RGBA").save(path)
                case 3:
                    picture.resize((640, 640), Image.Resampling.BICUBIC).save(path.with_suffix(".jpg"), quality=98)
    _, plain = audit(tmp_path / "plain", f"images={root}")
    found, odd = audit(tmp_path / "odd_run", f"images={tmp_path / 'odd'}")
    assert (plain.found == odd.found).mean() > 0.9
    both, columns = plain.found & odd.found, probability_columns({"gender": ("female", "male")})
    sure = both & (plain[columns].max(axis=1) > 0.9)
    assert sure.sum() >= 6
    assert (plain.loc[sure, columns].to_numpy().argmax(1) == odd.loc[sure, columns].to_numpy().argmax(1)).all()
    scale = (odd.x1 - odd.x0)[sure & (odd.image_index % 4 == 0)] / (plain.x1 - plain.x0)[sure & (odd.image_index % 4 == 0)]
    assert scale.between(2.5, 3.5).all()  # boxes are in pixels of the picture


def test_unreadable_pictures_are_counted_and_named_and_never_fatal(shown, tmp_path, no_model, capsys):
    root = folders(tmp_path / "given", shown)
    bad = root / PROMPTS[0]
    (bad / "2.png").write_bytes((bad / "2.png").read_bytes()[:200])
    (bad / "face.heic").write_bytes(b"ftypheic")
    Image.new("RGB", (2, 2)).save(bad / "dot.gif")
    (root / "a photo of nobody").mkdir()
    (root / "a photo of nobody" / "0.png").touch()
    found, records = audit(tmp_path / "run", f"images={root}")
    unreadable = found["provenance"]["pictures_unreadable"]
    assert {Path(file).name for file in unreadable} == {"2.png", "face.heic", "dot.gif", "0.png"}
    assert "damaged" in unreadable[str(bad / "2.png")] and "2×2 pixels" in unreadable[str(bad / "dot.gif")]
    assert found["provenance"]["prompts_left_out"] == ["a photo of nobody"] and found["prompts"] == 2
    assert list(records[records.prompt == PROMPTS[0]].image_index) == [0, 1, 3, 4, 5]
    said = capsys.readouterr().out
    assert "4 of 15 pictures could not be read" in said and "dot.gif" in said
    page = next((tmp_path / "run").glob("audits/*/report.html")).read_text("utf-8")
    assert "4 of 15 pictures could not be read" in page and "face.heic" in page


def test_two_folders_are_compared_in_pairs(shown, tmp_path, no_model):
    """After has the same images for one prompt and another order for the other; images without a partner are unpaired."""
    before, after = folders(tmp_path / "b", shown), folders(tmp_path / "a", {t: i.copy() for t, i in shown.items()})
    for i, image in enumerate(shown[PROMPTS[1]][::-1]):
        Image.fromarray(image).save(after / PROMPTS[1] / f"{i}.png")
    (after / PROMPTS[0] / "3.png").unlink()
    found, records = audit(tmp_path / "run", f"images=[{before},{after}]")
    pairs = 2 * EACH - 1
    assert found["paired"]["pairs"] == pairs and found["provenance"]["pairs"] == "by file name"
    assert len(records) == 4 * EACH - 1
    rows = records[records.model == "after"].set_index("prompt")
    assert np.allclose(rows.loc[PROMPTS[0]].dino, 1, atol=2e-3) and (rows.loc[PROMPTS[1]].dino < 0.999).all()
    labels = {
        m: (g["p.gender.female"] > 0.5).where(g.found).to_dict()
        for m, g in records.set_index(["prompt", "image_index"]).groupby("model")
    }
    common = [k for k, v in labels["after"].items() if pd.notna(v) and pd.notna(labels["before"].get(k, np.nan))]
    changed = np.mean([labels["before"][k] != labels["after"][k] for k in common])
    assert found["paired"]["attributes"]["gender"]["class_changed"] == pytest.approx(changed) and changed > 0


def test_a_manifest_may_hold_both_and_pairs_by_key(shown, tmp_path, no_model):
    rows = []
    for model, step in (("before", 1), ("after", -1)):
        for text, images in shown.items():
            for i in range(EACH)[::step]:
                name = f"{model}-{len(rows)}.png"
                Image.fromarray(images[i]).save(tmp_path / name)
                rows.append({"model": model, "prompt": text, "image": name, "pair": f"noise {i}"})
    manifest(tmp_path / "manifest.csv", rows)
    found, records = audit(tmp_path / "run", f"images={tmp_path}")
    assert found["paired"]["pairs"] == 2 * EACH and found["provenance"]["pairs"] == "by pair"
    assert np.allclose(records[records.model == "after"].dino, 1, atol=2e-3)
    assert found["paired"]["attributes"]["gender"]["class_changed"] == 0


def test_without_an_encoder_semantics_are_null_and_it_is_said_why(shown, tmp_path, no_model, capsys):
    root = folders(tmp_path / "given", shown)
    found, records = audit(tmp_path / "run", f"images={root}", f"features.clip={tmp_path}/none")
    assert found["models"]["before"]["clip_t"]["mean"] is None and records.clip_t.isna().all()
    assert found["models"]["before"]["between_seeds"]["mean"] is not None
    assert found["provenance"]["CLIP"].startswith("not at hand: features.clip: ")
    assert "CLIP-T and CLIP-I are not measured: not at hand: features.clip" in capsys.readouterr().out


def test_as_a_gate_the_command_exits_with_3_behind_its_report(shown, tmp_path, no_model, monkeypatch, capsys):
    root = folders(tmp_path / "given", shown)

    def command(*overrides) -> tuple[int, list[str]]:
        words = [f"hydra.run.dir={tmp_path / 'run'}", "cache=null", f"images={root}", *overrides]
        monkeypatch.setattr(sys, "argv", ["audit", *words])
        try:
            audit_command()
        except SystemExit as end:
            return end.code, capsys.readouterr().err.splitlines()
        return 0, capsys.readouterr().err.splitlines()

    code, (line,) = command("audit.fail_above=0.1")
    assert code == 3 and line.startswith("audit.fail_above=0.1: gender is not decided, these prompts, D ")
    (where,) = (tmp_path / "run" / "audits").iterdir()
    assert (where / "report.html").exists()
    assert command("audit.fail_above=0.1")[0] == 3 and command() == (0, [])  # the same audit, finished
    assert len(list((tmp_path / "run" / "audits").iterdir())) == 1
    code, (line,) = command("audit.fail_above=0.1", "audit.equivalence=0.2")
    assert code == 2 and line == "error: audit.fail_above: found 0.1 beside audit.equivalence=0.2, allowed: one of them"
    text = (where / "summary.md").read_text("utf-8")
    assert "- **gender: not decided, these prompts.** D " in text and "female" in text and "noise floor" in text
    assert "never identity" in text and "[Full report](report.html)" in text and "Without a face: 0.0" in text
    numbers = json.loads((where / "audit.json").read_text("utf-8"))
    assert not faults(numbers, closed(schema()), closed(schema()))


def test_a_sweep_of_gates_exits_with_3_and_with_2_where_a_run_itself_fails(tmp_path, monkeypatch, capsys):
    def job(config, folder):
        raise (FairDiffError if config.seed > 1 else NotWithinMargin)("so")

    for seeds, code in (("0,1", 3), ("1,2", 2)):
        words = ["-m", f"seed={seeds}", f"hydra.sweep.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        with pytest.raises(SystemExit) as end:
            main(job)()
        assert end.value.code == code


def rows_of(*images: str, **more) -> list[dict]:
    return [{"prompt": "a nurse", "image": image} | more for image in images]


BAD = {
    "occurs twice, allowed: once, or a picture would be counted twice": rows_of("a.png", "a.png"),
    "needs a column image, found prompt": [{"prompt": "a nurse"}],
    "found the column images, allowed: image": [{"prompt": "a", "image": "a.png", "images": ""}],
    "line 2: the cell prompt is empty": [{"prompt": "", "image": "a.png"}],
    "line 2: model: found later, allowed: before, start, after": rows_of("a.png", model="later"),
    "no picture of the model before": rows_of("a.png", model="after"),
    "the pair 1 of 'a nurse' occurs twice before": rows_of("a.png", "b.png", pair="1"),
    "line 3: the prompt 'a nurse' stands with another family": rows_of("a.png", family="x") + rows_of("b.png", family="y"),
    "people: found perhaps, allowed: yes, no": rows_of("a.png", people="perhaps"),
    "no prompt of people has a picture that can be read": rows_of("a.png", people="no"),
    "absent.png: no such file": rows_of("absent.png"),
}


@pytest.mark.parametrize("says", BAD)
def test_a_bad_manifest_is_one_line(says, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    manifest(tmp_path / "manifest.csv", BAD[says])
    with pytest.raises(FairDiffError) as error:
        read_pictures(str(tmp_path), None)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bad_settings_are_one_line(tmp_path, monkeypatch, capsys):
    def refused(*overrides):
        with pytest.raises(FairDiffError) as error:
            audit_job(composed(["cache=null", *overrides])[0], tmp_path / "run")
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = tmp_path / "a"
    folder.mkdir()
    assert "found no manifest.csv and no sub-folder with pictures" in refused(f"images={folder}")
    assert "images: found ['a'], allowed: a folder, two folders [before, after]" in refused("images=[a]")
    assert "manifest: found m.csv without images" in refused("manifest=m.csv")
    assert "manifest: m.csv: cannot read it" in refused(f"images={folder}", "manifest=m.csv")
    assert "adapter.path: found x beside images" in refused("images=a", "adapter.path=x")
    assert "images: found an empty path" in refused("images=''")
    for name in "ab":
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    rows = [{"prompt": "a woman", "image": "a.png", "names": "gender.woman"}, *({**r, "names": ""} for r in rows_of("b.png"))]
    manifest(folder / "manifest.csv", rows)
    assert "names: found gender.woman, allowed: gender.female, gender.male" in refused(f"images={folder}")
    with pytest.raises(FairDiffError, match="images: found a, allowed: null in training"):
        train_job(composed(["images=a"])[0], tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["audit", f"hydra.run.dir={tmp_path / 'run'}", "images=nowhere"])
    with pytest.raises(SystemExit) as end:
        audit_command()
    assert end.value.code == 2 and capsys.readouterr().err == "error: images: nowhere: no such folder\n"
