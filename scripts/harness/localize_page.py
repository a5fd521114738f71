"""Build the page of scripts/localize.py from its record."""

import re
from html import escape

import numpy as np

from fairdiff.audit.suite import ratio_interval
from fairdiff.audit.wording import interval, number, percent
from fairdiff.studies.page import Page, Point, Section, curves_chart

LEAD = (
    "This page shows which parts of a LoRA cause its effect on bias, and how few of them are enough. Labels are "
    "perceived presentation in images, never identity."
)
ENOUGH = 0.9  # share of the effect that the smallest adapter must keep
METHOD = (
    "Each layer's update is split into its singular components. The score of a component is the first-order change of "
    "the alignment loss without it, mean over training batches. Its size is its Frobenius norm. Adapters with only "
    "the first components by score, by size or at random are audited with the same noise.",
    "Effect kept is the fall of bias with the sparse adapter divided by that with the whole one, over the same "
    "prompts. [low, high] is a 95 % interval over prompts (Student's, of the linearised ratio).",
)
NOT_SHOWN = (
    "That a part is necessary: another training may find another way, which `--retrain` measures. The parts found are "
    "sufficient only.",
    "Other noise and other seeds of training.",
    "Joint effects of parts: a score is for removing one component from the whole adapter.",
)


def effect(point: dict, attribute: str) -> np.ndarray:
    """Return the decrease of bias of each prompt [P], NaN for a prompt without a face."""
    before, after = (np.array(point[m][attribute], float) for m in ("before", "after"))
    return before - after


def kept_share(point: dict, whole: dict, attribute: str) -> tuple[float | None, tuple[float, float] | None]:
    """Return the share of the whole adapter's effect with its interval; None if the whole one has no effect."""
    return _ratio(effect(point, attribute), effect(whole, attribute))


def _ratio(own: np.ndarray, full: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    seen = np.isfinite(own) & np.isfinite(full)
    own, full = own[seen], full[seen]
    if len(own) < 2 or full.mean() <= 0:
        return None, None
    return float(own.mean() / full.mean()), ratio_interval(own, full)


def came_back(row: dict, whole: dict, attribute: str) -> tuple[float | None, tuple[float, float] | None]:
    """Return the effect that retraining adds to the adapter without these components, as a share of the whole effect."""
    held, anew = (effect(row[kind], attribute) for kind in ("removed", "retrained"))
    return _ratio(anew - held, effect(whole, attribute))


def smallest(points: dict[str, list[dict]], attributes: list[str]) -> tuple[str, dict] | None:
    """Return (order, point) with the fewest components that keep ENOUGH of the effect on each attribute.

    The random order and the whole adapter do not count. None if there is no such point.
    """
    (whole,), least = points["whole"], None
    for order, some in points.items():
        for point in some:
            shares = [kept_share(point, whole, attribute)[0] for attribute in attributes]
            enough = order not in ("whole", "random") and all(share is not None and share >= ENOUGH for share in shares)
            if enough and (least is None or point["components"] < least[1]["components"]):
                least = order, point
    return least


def page(kept: dict, command: str) -> Page:
    whole = kept["points"]["whole"][0]
    sections = [Section("Method", METHOD)]
    sections += [_effect(kept, whole, attribute) for attribute in whole["before"]]
    if kept["retrained"]:
        sections += [_retrained(kept["retrained"], whole, attribute) for attribute in whole["before"]]
    sections.append(_places(kept))
    sections += map(_overlap, kept["overlaps"])
    prompts, images = whole["size"]
    about = {"prompts": f"{kept['split']}, {prompts} × {images} images", "settings": " ".join(kept["settings"])}
    about |= {"batches of the scores": str(kept["batches"]), "components": str(len(kept["components"]))}
    return Page("Where the effect sits", LEAD, sections, NOT_SHOWN, command, about)


def _effect(kept: dict, whole: dict, attribute: str) -> Section:
    rows, curves = [], {}
    for order, points in kept["points"].items():
        for point in points:
            share, ends = kept_share(point, whole, attribute)
            bias = float(np.nanmean(np.array(point["after"][attribute], float)))
            name = _named(order, point["share"])
            rows.append([name, str(point["components"]), number(bias), _share(share, ends), number(point["dino"])])
            place = "by " + order if order != "random" else "at random"
            curves.setdefault("whole" if order == "whole" else place, []).append(Point(point["share"], bias, tip=name))
    before = np.array(whole["before"][attribute], float)
    least, found = "None of them keeps 90 % of the effect.", smallest(kept["points"], [attribute])
    if found is not None:
        name = _named(found[0], found[1]["share"])
        least = f"The smallest that keeps 90 % of the effect: {name}, {found[1]['components']} components."
    text = [f"Before: {number(float(np.nanmean(before)))}; noise floor {number(whole['floor'][attribute])}. {least}"]
    head = ["adapter", "components", f"{attribute} bias", "effect kept", "image encoder"]
    chart = curves_chart(curves, f"{attribute} bias", "share of the components that is kept", whole["floor"][attribute])
    return Section(f"{attribute.capitalize()}: how little keeps the effect", text, head, rows, [chart])


def _named(order: str, share: float) -> str:
    if order == "whole":
        return "whole adapter"
    return f"first {percent(share)} by {order}" if order != "random" else f"first {percent(share)} at random"


def _share(share: float | None, ends: tuple[float, float] | None) -> str:
    return f"{percent(share)} {interval(list(ends), percent) if ends else ''}".rstrip()


def _retrained(found: list[dict], whole: dict, attribute: str) -> Section:
    rows = []
    for row in found:
        shares = [_share(*kept_share(row[kind], whole, attribute)) for kind in ("removed", "retrained")]
        back, ends = came_back(row, whole, attribute)
        bias = float(np.nanmean(np.array(row["retrained"]["after"][attribute], float)))
        answer = "cannot tell" if ends is None or ends[0] <= 0 <= ends[1] else "yes" if ends[0] > 0 else "no"
        cells = [_named(row["order"], row["share"]), str(row["components"]), *shares, _share(back, ends), answer]
        rows.append([*cells, number(bias), number(row["retrained"]["dino"]), percent(row["common"])])
    head = ["held at zero", "components", "effect without them", "retrained", "came back", "another way", "bias, retrained"]
    text = [
        "Retrained: the same training from its start, with the same seed, prompts and steps, in which these components are "
        "held at zero: the update writes nothing where they write and reads nothing where they read. Shares are of the "
        "whole adapter's effect. Came back: retrained minus without. Layers in common: how much of the squared norm of the "
        "two updates lies in the same layers; the directions within a layer are others.",
    ]
    head += ["image encoder, retrained", "layers in common"]
    return Section(f"{attribute.capitalize()}: does training find another way?", text, head, rows)


def group_of(part: str, layer: str) -> tuple[str, str]:
    """Return the block and the kind of a layer, such as ("unet down_blocks.1", "attn2.to_k")."""
    found = re.match(r"((?:down_blocks|up_blocks|layers|encoder\.layers|transformer_blocks)\.\d+|mid_block)", layer)
    block = (found[1] if found else layer.split(".")[0]).removeprefix("encoder.")
    kind = re.search(r"(attn\d\.to_\w+|self_attn\.\w+|mlp\.\w+|ff\.net\.\d+(?:\.\w+)?)", layer)
    return f"{part} {block}", kind[1] if kind else layer.split(".")[-1]


def _places(kept: dict) -> Section:
    """Return the section with the shares of the score by block and kind of layer, as a table and a heat map."""
    table: dict[tuple[str, str], float] = {}
    for part, layer, _, _, score in kept["components"]:
        place = group_of(part, layer)
        table[place] = table.get(place, 0.0) + score
    total = sum(table.values()) or 1.0
    blocks, kinds = list(dict.fromkeys(b for b, _ in table)), sorted({k for _, k in table})
    largest = sorted(table.items(), key=lambda item: -item[1])[:10]
    rows = [[block, kind, percent(value / total)] for (block, kind), value in largest]
    chart = heat_map({place: value / total for place, value in table.items()}, blocks, kinds)
    text = ["Share of the sum of all scores; the ten largest places as a table."]
    return Section("Where the score lies", text, ["block", "layer", "share of the score"], rows, [chart])


def heat_map(values: dict[tuple[str, str], float], rows: list[str], columns: list[str]) -> str:
    """Return an SVG grid of shaded cells with tooltips; an empty cell has no such layer."""
    left, top, width, height = 190, 96, 52, 24
    most = max(values.values(), default=1.0) or 1.0
    body = []
    for j, column in enumerate(columns):
        x = left + j * width + width / 2
        place = f'x="{x}" y="{top - 8}" transform="rotate(-45 {x} {top - 8})"'
        body.append(f'<text class="tick" {place}>{escape(column)}</text>')
    for i, row in enumerate(rows):
        y = top + i * height
        body.append(f'<text class="name" x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(columns):
            if (row, column) in values:
                value, x = values[row, column], left + j * width
                shade = f'style="fill:var(--after);opacity:{0.06 + 0.94 * value / most:.2f}"'
                tip = f"<title>{escape(row)} {escape(column)}: {percent(value)}</title>"
                body.append(f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" {shade}>{tip}</rect>')
    size = f"{left + len(columns) * width + 60} {top + len(rows) * height + 8}"
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="share of the score by block and layer">{"".join(body)}</svg>'


def _overlap(found: dict) -> Section:
    one, other = found["of"]
    what = "components" if found["same"] else "layers, by how many of their components are among the first,"
    rows = [
        [percent(share), number(value), interval(ends), number(again)] for share, value, ends, again in found["rows"]
    ]
    text = [
        f"Jaccard overlap of the {what} that come first by the score of `{one}` and by that of `{other}`. By chance: the "
        "95 % range of independent orders. With itself: of two halves of the batches, the lesser of both; an overlap of two "
        "parts is not expected to exceed it.",
    ]
    title = f"Overlap of the parts for {one} and for {other}" if found["same"] else "Overlap with another adapter"
    return Section(title, text, ["first", "overlap", "by chance", "with itself"], rows)
