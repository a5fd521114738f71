"""Train an attribute classifier on a folder of labelled faces, and measure it on held-out faces.

python scripts/train_classifier.py FOLDER JUDGE model=sd15 'attribute=[gender,race,age]'
python train.py model=sd15 judge=net judge.path=JUDGE ...   (audit with another: judge@audit.judge=net audit.judge.path=)

FOLDER holds labels.csv (image, gender, race, age), or the original files of FairFace or CelebA: classifiers/labels.py. It
trains on the split "train" and measures on "val"; without splits, a fifth is held out by a hash of the name. Use the settings
of the later run: they give attributes, detector and crops. Weights start at random. Repeat the command to continue.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from build_bank import configure
from calibrate import data_hash, looking, measure

from classifiers.attributes import MEAN, STD, AttributeNet, save_attribute_net
from classifiers.calibration import CALIBRATION_FILE
from classifiers.faces import MARGIN, read_faces, store_faces, stored_boxes, stored_side
from classifiers.label_errors import Relaxation
from classifiers.labels import LabelledFiles, read_labels
from classifiers.training import FitPlan, dropped_shares, fit
from fairdiff import fingerprint
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail, told
from fairdiff.config import Config, JudgeConfig
from fairdiff.diffusion.load import check_device
from fairdiff.errors import FairDiffError, blame
from fairdiff.files import write_json
from fairdiff.training.tracking import make_console, progress

WORK = "work"  # folder for faces and the checkpoint in the classifier's folder, until it is done


def split(folder: Path, attributes: dict[str, tuple[str, ...]], name: str) -> LabelledFiles:
    """Return the files of a split, which is made by hash if the folder has no splits."""
    with blame("folder"):
        return read_labels(folder, attributes).with_held_out().of_split(name)


def net_config(config: Config, architecture: str, kwargs: str) -> dict:
    try:
        options = json.loads(kwargs)
    except ValueError as error:
        raise FairDiffError(f"--kwargs: is not JSON ({error})") from error
    return {
        "architecture": architecture,
        "kwargs": options,
        "image_size": config.detector.crop_size,
        "mean": list(MEAN),
        "std": list(STD),
        "attributes": {name: list(classes) for name, classes in config.classes.items()},
    }


def new_net(about: dict, seed: int) -> AttributeNet:
    torch.manual_seed(seed)
    try:
        return AttributeNet(about)
    except Exception as error:  # timm raises many classes
        words = " ".join(str(error).split())[:200]
        raise FairDiffError(f"--architecture, --kwargs: timm cannot build {about['architecture']} ({words})") from error


def collect_faces(files: LabelledFiles, config: Config, work: Path) -> tuple[np.ndarray, LabelledFiles]:
    """Crop the faces and store them on disk. Return their images, memory-mapped, and the files that have a face."""
    side = stored_side(config.detector.crop_size)
    look, detector = looking(config, side, MARGIN * config.detector.expand)
    request = fingerprint.of_values(data_hash(files), detector, side)
    with progress(make_console()) as bar:
        task = bar.add_task("pictures", total=len(files), note="")
        for done, found in store_faces(files.files, look, side, work, request):
            bar.update(task, completed=done, note=f"{found} faces")
    images, rows = read_faces(work)
    return images, files.rows(np.isin(np.arange(len(files)), rows))


def labels_for(faces: LabelledFiles, attributes: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Return the labels of every attribute. FairDiffError for a class without a training face."""
    for name, classes in attributes.items():
        counts = np.bincount(faces.labels.get(name, np.array([-1])) + 1, minlength=len(classes) + 1)[1:]
        if not counts.all():
            rare = classes[int(counts.argmin())]
            raise FairDiffError(f"folder: {name}: no face to train on is labelled {rare}, allowed: faces of every class")
    return {name: faces.labels[name] for name in attributes}


def count(label_N: np.ndarray, classes: tuple[str, ...]) -> dict[str, int]:
    """Return the number of faces in each class."""
    return dict(zip(classes, np.bincount(label_N[label_N >= 0], minlength=len(classes)).tolist(), strict=True))


def train(files: LabelledFiles, config: Config, plan: FitPlan, net: AttributeNet, relaxation: Relaxation | None) -> dict:
    """Fit the net, and return its entries for training.json."""
    images, faces = collect_faces(files, config, plan.checkpoint.parent)
    labels = labels_for(faces, net.attributes)
    boxes = stored_boxes(len(faces), config.detector.crop_size, plan.expand)
    with progress(make_console()) as bar, blame("judge"):
        task = bar.add_task("steps", total=plan.steps, note="")

        def tell(step: int, loss: float) -> None:
            bar.update(task, completed=step, note=f"loss {loss:.3f}")

        fit(net.to(config.model.device), images, labels, plan, progress=tell, boxes=boxes, relaxation=relaxation)
    counts = {name: count(labels[name], classes) for name, classes in net.attributes.items()}
    about = {"pictures": len(files), "faces": counts, "steps": plan.steps, "batch": plan.batch, "seed": plan.seed}
    dropped = dropped_shares(plan.checkpoint, labels, net.attributes)
    return about | ({"dropped": dropped} if dropped else {})


def make(args: argparse.Namespace, config: Config) -> str:
    """Train the classifier unless it exists, measure it, and return a summary."""
    check_device(config.model.device)
    about, relaxation = net_config(config, args.architecture, args.kwargs), None
    net, files = new_net(about, args.seed), split(args.folder, config.classes, "train")
    if args.rockafellian:
        relaxation = Relaxation(args.wrong_labels)
    options = [about, args.steps, args.batch, args.seed, args.no_class_weights, relaxation and vars(relaxation)]
    request = fingerprint.of_values(options, data_hash(files), vars(config.detector))
    work = args.judge / WORK
    plan = FitPlan(
        args.steps,
        args.batch,
        seed=args.seed,
        expand=config.detector.expand,
        class_weights=not args.no_class_weights,
        checkpoint=work / f"{request}.pt",
    )
    refuse_another(args.judge, request)
    if not (args.judge / "config.json").exists():
        trained = train(files, config, plan, net, relaxation)
        write_json(args.judge / "training.json", {"request": request} | trained)
        save_attribute_net(net, args.judge)  # it writes config.json last
    measured = replace(config, audit=replace(config.audit, judge=JudgeConfig("net", str(args.judge))))
    said = measure(measured, args.judge / CALIBRATION_FILE, args.folder, lambda f, classes: split(f, classes, "val"))
    shutil.rmtree(work, ignore_errors=True)
    return said


def refuse_another(judge: Path, request: str) -> None:
    """Raise FairDiffError if the folder holds a classifier that was made by another command."""
    if not (judge / "config.json").exists():
        return
    try:
        if json.loads((judge / "training.json").read_text(encoding="utf-8"))["request"] == request:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FairDiffError(f"judge: {judge} holds a judge of other faces or options, allowed: a new folder")


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of labelled faces")
    parser.add_argument("judge", type=Path, help="a new folder, or one to go on with")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, as for train.py")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", default="resnet18", help="of timm")
    parser.add_argument("--kwargs", default="{}", metavar="JSON", help="of the architecture")
    parser.add_argument("--no-class-weights", action="store_true", help="rare classes count less than frequent ones")
    parser.add_argument("--rockafellian", action="store_true", help="labels may be wrong: docs/explanation/label_errors.md")
    parser.add_argument("--wrong-labels", type=float, metavar="SHARE", help="with it; default: estimated in each group")
    args = parser.parse_intermixed_args(argv)
    for key, low in (("steps", 1), ("batch", 2), ("seed", 0)):
        if vars(args)[key] < low:
            parser.error(f"--{key}: found {vars(args)[key]}, allowed: {low} or more")
    if args.wrong_labels is not None and not (args.rockafellian and 0 <= args.wrong_labels <= 0.5):
        parser.error(f"--wrong-labels: found {args.wrong_labels}, allowed: 0 to 0.5, with --rockafellian")
    try:
        print(make(args, configure(args.settings)))
    except Exception as error:
        fail(told(error))


if __name__ == "__main__":
    main()
