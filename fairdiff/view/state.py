"""The content of a run folder as numbers for the live page, read again on every request."""

from pathlib import Path

from fairdiff.errors import FairDiffError
from fairdiff.files import read_yaml
from fairdiff.training.tracking import PICTURES, read_metrics

SMOOTH = 0.9  # of the moving averages
POINTS = 400  # of a curve, at most


def require_run(folder: Path) -> None:
    """FairDiffError unless a run of training or an audit lies there."""
    if not (folder / "run.json").is_file():
        raise FairDiffError(f"{folder}: holds no run.json, allowed: a run folder, such as outputs/gender/default/seed0")


def state(folder: Path) -> dict:
    """Steps done and requested, curves of loss terms and of shares beside their target, grids, reports, whether there is an
    adapter to try.

    A curve is a list of [step, value]; values are moving averages over steps, without the bias of their start.
    """
    rows, settings = read_metrics(folder / "metrics.jsonl"), _settings(folder)
    done = rows[-1]["step"] + 1 if rows else 0
    seconds = [row["seconds"] for row in rows[-20:] if isinstance(row.get("seconds"), int | float)]
    requested = settings.get("steps", done)
    return {
        "name": "/".join(folder.resolve().parts[-3:]),
        "steps": done,
        "requested": requested,
        "seconds_left": round(sum(seconds) / len(seconds) * max(requested - done, 0)) if seconds else None,
        "losses": _curves(rows, "loss."),
        "shares": _curves(rows, "share."),
        "targets": {key.removeprefix("target."): points[-1][1] for key, points in _curves(rows, "target.", 0.0).items()},
        "validation": _curves(rows, "validation.", 0.0),
        "pictures": sorted(path.name for path in (folder / PICTURES).glob("step_*.png")),
        "reports": sorted(path.parent.name for path in folder.glob("audits/*/report.html")),
        "adapter": (folder / "adapter" / "adapter.json").is_file(),
    }


def _settings(folder: Path) -> dict:
    path = folder / "config.yaml"
    return read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _curves(rows: list[dict], prefix: str, smooth: float = SMOOTH) -> dict[str, list[list[float]]]:
    """Of each key with this prefix its moving average over the rows that have it: sum_i s^(n-i) x_i / sum_i s^(n-i)."""
    found: dict[str, list[list[float]]] = {}
    for key in sorted({k for row in rows for k in row if k.startswith(prefix)}):
        total = mass = 0.0
        points = []
        for row in rows:
            value = row.get(key)
            if isinstance(value, int | float):
                total, mass = smooth * total + value, smooth * mass + 1
                points.append([row["step"], total / mass])
        stride = -(-len(points) // POINTS) or 1
        found[key.removeprefix(prefix)] = points[::-1][::stride][::-1]
    return {name: points for name, points in found.items() if points}
