"""Count an attribute classifier's errors on a folder of labelled faces, so that audits can correct for them.

python scripts/calibrate.py FOLDER model=sd15 judge@audit.judge=hf audit.judge.path=JUDGE        written to its folder
python scripts/calibrate.py FOLDER --out gender.json judge@audit.judge=open_clip audit.judge.path=ViT-L-14/laion2b_s32b_b82k
python scripts/audit.py audit.calibration=gender.json judge@audit.judge=open_clip audit.judge.path=ViT-L-14/laion2b_s32b_b82k

FOLDER holds labels.csv (image, gender, race, age), or the original files of FairFace or CelebA: classifiers/labels.py.
The settings are those of the audit: its classifier, its detector, its crops. Faces that the classifier was trained on do
not show its errors, so the validation split is used if the folder has splits. Repeat the command to continue.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from build_bank import configure

from classifiers.calibration import CROPS, Calibration, calibrate, save_calibration
from classifiers.judging import FACE, Look, judge_files, largest_face
from classifiers.labels import SPLITS, LabelledFiles, read_labels
from classifiers.page import draw_reliability, page
from fairdiff import builder, fingerprint
from fairdiff.builder.audit import judge_name
from fairdiff.builder.calibration import calibration_file
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail, told
from fairdiff.config import Config
from fairdiff.diffusion.load import check_device
from fairdiff.errors import FairDiffError, blame
from fairdiff.files import write_text
from fairdiff.portraits import weights
from fairdiff.training.tracking import make_console, progress

Classes = dict[str, tuple[str, ...]]
Choose = Callable[[Path, Classes], LabelledFiles]


def where(config: Config, out: Path | None) -> Path:
    """Return the file to write: --out, else `audit.calibration`, else the file in the classifier's folder."""
    file = out or calibration_file(config)
    if file is None:
        raise FairDiffError("--out: found nothing, but this judge has no folder; allowed: a new file, such as judge.json")
    if file.parent.resolve() == weights("audit_judge").resolve():
        raise FairDiffError("--out: found nothing, allowed with the embedded judge: a new file, for audit.calibration=<it>")
    return file


def labelled(folder: Path, attributes: Classes, split: str | None) -> LabelledFiles:
    """Return the labelled files of a split; by default those of "val" if the folder has it, else all."""
    with blame("folder"):
        files = read_labels(folder, attributes)
        return files.of_split(split or ("val" if "val" in files.splits else "all"))


def data_hash(files: LabelledFiles) -> str:
    """Return a hash of the files' names, sizes and labels."""
    with blame("folder"):
        sizes = [file.stat().st_size if file.is_file() else -1 for file in files.files]
    return fingerprint.of_values(files.names, sizes, {name: label_N.tolist() for name, label_N in files.labels.items()})


def looking(config: Config, crop_size: int, expand: float, aligned: bool = False) -> tuple[Look, str]:
    """Return the function that detects and crops the largest face of a file, and the detector's fingerprint."""
    detector, device = builder.build_detector(config), config.model.device
    cutting = {"crop_size": crop_size, "expand": expand, "aligned": aligned}
    look = partial(largest_face, detector=detector, device=device, **cutting)
    return look, builder.detector_fingerprint(config, detector, config.audit.judge)


def measure(config: Config, file: Path, folder: Path, choose: Choose) -> str:
    """Write the calibration, its page and its diagram unless they exist, and return a summary.

    choose: a function (folder, the classifier's attributes) -> the labelled files to use.
    """
    check_device(config.model.device)
    judge = builder.build_classifier(
        config.audit.judge, "audit.judge", "audit_judge", config.classes, config.model.device
    )
    files = choose(folder, judge.attributes)
    crop = builder.crop_of(config, config.audit.judge)
    crops = {key: getattr(crop, key) for key in CROPS} | ({"align": True} if crop.align else {})
    look, detector = looking(config, crop.crop_size, crop.expand, crop.align)
    hashes = {name: builder.judge_fingerprint(judge, name) for name in judge.attributes}
    data = data_hash(files)
    request = fingerprint.of_values(data, hashes, detector)
    if made_before(file, request):
        return f"{file}: made before"
    part = file.with_name(f"{file.name}.part")
    with progress(make_console()) as bar, blame("audit.judge"):
        task = bar.add_task("pictures", total=len(files), note="")
        for known in judge_files(files.files, look, judge, part, request):
            bar.update(task, completed=known.done, note=f"{known.counts()['found']} faces")
    if not known.counts()["found"]:
        raise FairDiffError(f"folder: {folder}: {known}; allowed: pictures of faces")
    faces = files.rows(known.found_N == FACE)
    with blame("folder"):
        found = calibrate(known.logits(judge.attributes), faces.labels, judge.attributes)
    about = {
        "request": request,
        "judge": judge_name(config.audit.judge),
        "data": {"folder": folder.name, "layout": files.layout, "split": sorted({*files.splits}), "hash": data},
        "faces": known.counts(),
    }
    write(file, {name: replace(c, judge=hashes[name]) for name, c in found.items()}, crops, about)
    part.unlink(missing_ok=True)
    shares = ", ".join(f"{name} {100 * c.accuracy:.1f} %" for name, c in found.items())
    return f"{known}\naccuracy: {shares}\npage: {file.with_suffix('.md')}\n{file}"


def write(file: Path, found: dict[str, Calibration], crops: dict, about: dict) -> None:
    """Write the page and its diagram, then the calibration file, whose existence means that all is done."""
    picture = file.with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_reliability(found, picture)
    data, faces = about["data"], about["faces"]
    split = "/".join(filter(None, data["split"])) or "none"
    lines = {
        "judge": f"{about['judge']} ({', '.join(f'{name} {c.judge}' for name, c in found.items())})",
        "faces": f"{data['folder']}, {data['layout']}, split {split} ({data['hash']})",
        "pictures": f"{faces['found']} with a face, {faces['not_found']} without one, {faces['unreadable']} unreadable",
        "crops": ", ".join(f"{key} {value}" for key, value in crops.items()),
    }
    write_text(file.with_suffix(".md"), page(found, lines, picture.name if drawn else None))
    save_calibration(found, crops, file, about)


def made_before(file: Path, request: str) -> bool:
    """Return whether the file was made by this request. A file made with other faces or another classifier is replaced."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["request"] == request
    except (OSError, ValueError, KeyError, TypeError):
        return False


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of labelled faces")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the audit, as for scripts/audit.py")
    parser.add_argument("--out", type=Path, help="the file to write; default: calibration.json in the judge's folder")
    parser.add_argument("--split", choices=[*SPLITS, "all"], help="default: val where the folder has splits, else all")
    args = parser.parse_intermixed_args(argv)
    try:
        config = configure(args.settings)
        print(measure(config, where(config, args.out), args.folder, partial(labelled, split=args.split)))
    except Exception as error:
        fail(told(error))


if __name__ == "__main__":
    main()
