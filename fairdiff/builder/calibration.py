"""Read the audit judge's error counts as the settings say, or say why there are none."""

from pathlib import Path

import numpy as np

from classifiers.calibration import CALIBRATION_FILE, Calibration, load_calibration
from fairdiff.audit.judge import check_confusion
from fairdiff.builder.judges import Judge, crop_of, judge_fingerprint
from fairdiff.config import Config
from fairdiff.errors import FairDiffError, blame
from fairdiff.portraits import weights

OWNERS = {"align": "judge"}  # of options that the detector has not
DECLINED = "none"  # of audit.calibration


def calibration_file(config: Config) -> Path | None:
    """The path of the audit judge's error counts: `audit.calibration`, else calibration.json in the judge's folder.

    None for a judge without a folder: one of the hub, several paths.
    """
    if config.audit.calibration not in (None, DECLINED):
        return Path(config.audit.calibration)
    judge = config.audit.judge
    place = judge.path or (weights("audit_judge") if judge.type == "net" else None)
    folder = Path(place) if isinstance(place, str | Path) else None
    return folder / CALIBRATION_FILE if folder is not None and folder.is_dir() else None


def build_confusion(config: Config, judge: Judge) -> dict[str, np.ndarray]:
    """The audit judge's confusion counts [K, K] per attribute, {} if its errors were not counted, or if that is declined.

    FairDiffError for a calibration of another judge or of other crops.
    """
    key, file, found = _accepted(config, dict(judge.attributes))
    for name, calibration in found.items():
        unsigned = calibration.judge is None and config.audit.judge.type == "net" and key == "audit.judge.path"  # older
        if not unsigned and calibration.judge != judge_fingerprint(judge, name):
            why = "was measured with another judge, weights or words than this audit's"
            why = "does not say with which judge it was measured" if calibration.judge is None else why
            raise FairDiffError(
                f"{key}: {file}: {name} {why}; allowed: a file that scripts/calibrate.py wrote with this judge"
            )
    return {name: calibration.counts for name, calibration in found.items()}


def read_confusion(config: Config) -> dict[str, np.ndarray]:
    """The error counts of the requested attributes, without building the judge or checking that the file belongs to it."""
    _, _, found = _accepted(config, config.classes)
    return {name: calibration.counts for name, calibration in found.items()}


def not_corrected(config: Config) -> str | None:
    """Why an audit does not undo the judge's counted errors although there are some; None where it does, or has none."""
    if config.audit.calibration != DECLINED:
        return None
    file = calibration_file(config)
    if file is None or not file.exists():
        return None
    reason = f"the calibration of this judge was declined (audit.calibration={DECLINED})"
    try:
        other = _other_crops(config, load_calibration(file)[1])
    except ValueError:
        return f"{reason}: {file.name} cannot be read"
    crops = ", ".join(f"{option}={there}, not {here}" for option, (there, here) in other.items())
    return f"{reason}: it was measured with {crops}" if other else reason


def _accepted(config: Config, classes: dict[str, tuple[str, ...]]) -> tuple[str, Path | None, dict[str, Calibration]]:
    """The key to blame, the file, and its calibrations of these attributes; FairDiffError for other crops or classes."""
    file, given = calibration_file(config), config.audit.calibration is not None
    key = "audit.calibration" if given else "audit.judge.path"
    if config.audit.calibration == DECLINED or file is None or not (given or file.exists()):
        return key, file, {}
    with blame(key):
        calibrations, measured_on = load_calibration(file)
    for option, (there, here) in _other_crops(config, measured_on).items():
        owner = OWNERS.get(option, "detector")
        raise FairDiffError(
            f"{key}: {file} was measured with {owner}.{option}={there}, found {here}: the judge errs otherwise there; "
            f"allowed: the same, a calibration of these crops (scripts/calibrate.py), or audit.calibration={DECLINED}, which "
            "corrects nothing"
        )
    calibrations = {name: c for name, c in calibrations.items() if name in classes}
    for name, calibration in calibrations.items():
        if tuple(classes[name]) != calibration.classes:
            raise FairDiffError(
                f"{key}: {file}: {name} has the classes {calibration.classes}, the judge {tuple(classes[name])}"
            )
        with blame(key, f": {file}: {name}: "):
            check_confusion(calibration.counts, len(calibration.classes))
    return key, file, calibrations


def _other_crops(config: Config, measured_on: dict) -> dict[str, tuple]:
    """Options of detector and crop that are others there than in this audit: option -> (there, here)."""
    crop = crop_of(config, config.audit.judge)
    found = {option: (there, getattr(crop, option)) for option, there in ({"align": False} | measured_on).items()}
    if config.detector.type != "mtcnn":  # others have no input_size
        found.pop("input_size", None)
    return {option: pair for option, pair in found.items() if pair[0] != pair[1]}
