"""The images of a report: for each noise one image per model, with the class that the audit judge sees.

Only thumbnails are shown: the first `STRIP` images of a prompt, taken from its strip in records/.
"""

import base64
import io
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pandas as pd
from PIL import Image

from fairdiff.audit.metrics import CONFIDENT
from fairdiff.audit.records import ANEW, STRIP, RecordStore, probability_columns
from fairdiff.audit.wording import attribute_order, percent
from fairdiff.errors import FairDiffError


def picture_groups(audit: dict, store: RecordStore) -> list[dict]:
    """Return every prompt of people with its pairs; families alternate, so that the first prompts show all of them.

    The note gives the share of the first attribute's first class by each model.
    """
    name = attribute_order(audit)[0]
    models = {model: entry["attributes"][name]["per_prompt"] for model, entry in audit["models"].items()}
    label, groups, met = audit["attributes"][name][0], [], Counter()
    for i, item in enumerate(next(iter(models.values()))):
        shares = [percent(rows[i]["shares"][label]["share"], 0) for rows in models.values()]
        about = {key: item[key] for key in ("subject", "prompt")} | {"note": f"{label} " + " → ".join(shares)}
        groups.append((met[item["family"]], about | {"pairs": pairs_of(audit, store, item["prompt"])}))
        met[item["family"]] += 1
    return [about for _, about in sorted(groups, key=lambda pair: pair[0])]


def grids_of_training(folder: Path, most: int = 4) -> list[dict]:
    """Return up to `most` of the step_<steps>.png in a folder, including first and last, as `steps` and a data URI."""
    files = sorted(folder.glob("step_*.png"))
    chosen = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)] if len(files) > most else files
    found = []
    for file in chosen:
        with suppress(FairDiffError):  # a damaged file is left out
            found.append({"steps": int(file.stem.removeprefix("step_")), "uri": _uri(_opened(file))})
    return found


def pairs_of(audit: dict, store: RecordStore, prompt: str) -> list[dict]:
    """Return one entry per noise: `shown`, the image of each model with its labels, and the values for the page's filters.

    A given image without a partner has an entry of its own. classes: "attribute class" by the last model. changed: whether
    the first and the last model differ in the first attribute's class or in whether there is a face.
    """
    seen = {model: _pictures(audit, store, model, prompt) for model in audit["models"]}
    if not all(seen.values()):
        return []
    pairs = []
    for index in sorted(set().union(*seen.values())):
        shown = [found[index] for found in seen.values() if index in found]
        first, last, whole = shown[0], shown[-1], len(shown) == len(seen)
        labels = last["labels"] if last["model"] == [*seen][-1] else {}
        pairs.append(
            {
                "number": index + 1,
                "shown": shown,
                "classes": [f"{name} {found['class']}" for name, found in labels.items()],
                "changed": whole and len(shown) > 1 and first["label"] != last["label"],
                "no_face": any(not picture["labels"] for picture in shown),
                "low_confidence": any(picture["low_confidence"] for picture in shown),
            }
        )
    return pairs


def _pictures(audit: dict, store: RecordStore, model: str, prompt: str) -> dict[int, dict]:
    """Return the first images of one model and prompt by image_index: data URI, `label` (class of the first attribute, or "no
    face") and `labels` of all attributes."""
    path = store.path(model, prompt, "png")
    if not path.exists():
        return {}
    rows = store.read(model, prompt).sort_values("image_index").head(STRIP)
    order = attribute_order(audit)
    found = {
        int(row.image_index): {"model": model, "uri": uri, "labels": _labels(row, audit["attributes"], order)}
        for uri, (_, row) in zip(tiles(path, len(rows)), rows.iterrows(), strict=True)
    }
    for picture in found.values():
        first = picture["labels"].get(order[0])
        picture["label"] = first["class"] if first else "no face"
        picture["low_confidence"] = first is not None and first["low_confidence"]
    return found


def _labels(row: pd.Series, attributes: dict[str, list[str]], order: list[str]) -> dict[str, dict]:
    """Return attribute -> class, whether its probability is below `CONFIDENT`, and all probabilities; {} without a face."""
    if not row.found:
        return {}
    result = {}
    for name in order:
        probabilities = [float(row[column]) for column in probability_columns({name: tuple(attributes[name])})]
        most = max(probabilities)
        result[name] = {
            "class": attributes[name][probabilities.index(most)],
            "low_confidence": most < CONFIDENT,
            "probabilities": dict(zip(attributes[name], probabilities, strict=True)),
        }
    return result


def tiles(path: Path, count: int) -> list[str]:
    """Return the images of a strip as JPEG data URIs (quality 88), so that the page needs no other files."""
    strip = _opened(path)
    width = strip.width // count
    if width * count != strip.width:
        raise FairDiffError(
            f"{path}: found {strip.width} pixels across, allowed: {count} pictures of equal width; {ANEW}"
        )
    return [_uri(strip.crop((i * width, 0, (i + 1) * width, strip.height))) for i in range(count)]


def strips(store: RecordStore, models: list[str], prompt: str) -> list[tuple[str, str]]:
    """Return the whole strip of each model that has one, as (model, data URI)."""
    paths = [(model, store.path(model, prompt, "png")) for model in models]
    return [(model, _uri(_opened(path))) for model, path in paths if path.exists()]


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's exceptions for a damaged file
        raise FairDiffError(f"{path}: cannot be read as an image ({type(error).__name__}); {ANEW}") from error


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
