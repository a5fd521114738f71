"""Build the page of scripts/languages.py from its record."""

import numpy as np
from reproduce.numbers import mean_interval

from fairdiff.audit.wording import interval, number, percent
from fairdiff.studies.languages import kept, reading
from fairdiff.studies.page import Page, Point, Section, curves_chart
from harness.cells import apart_cell, differences, mean_cell

REFERENCE, LEFT_OUT, SAME = "English", "occupation left out", "English, same words"
LEAD = (
    "This page shows the bias of prompts in other languages, and whether the model understood them: an ignored prompt "
    "may look fair. Labels are perceived presentation in images, never identity."
)
METHOD = (
    "Every image of a language has the noise of an English prompt and is compared with the English text. Bias is the "
    "mean over prompts of the gap between classes; 0 is parity. CLIP-T is the cosine of image and English text; "
    "larger is closer. [low, high] is a 95 % interval over prompts, and for the no-face rate one for these prompts. "
    "To English is the paired difference.",
    f"Of the occupation is CLIP-T above that of prompts with the {LEFT_OUT}, divided by the same in English; 100 % is as in "
    "English, 0 % is as if no occupation was named. If the interval of a language lies below 50 %, the model ignored the "
    f"prompt; if it lies above, the model read it. The row \"{SAME}\" uses \"…, occupation: …\" as in the other languages, "
    "which shows the effect of these words alone.",
)
NOT_SHOWN = (
    "Better translations: these are plain, and no native speaker has checked them.",
    "Grammatical gender: dictionaries give the masculine form in languages that have two. `--both-forms` names both.",
    "A language that a model half knows: Portraits learnt English only, and a second language of made-up synonyms would need "
    "other embedded weights. Words of other languages are unknown to Portraits, which shows what the warning is for and "
    "nothing about languages.",
    "Other noise and other seeds of training.",
)


def page(found: dict, command: str) -> Page:
    """Return the page. found: the record of scripts/languages.py."""
    sections = [Section("Method", METHOD)]
    parts = {part: {_shown(name): row for name, row in rows.items()} for part, rows in found["parts"].items()}
    attributes = list(next(iter(parts.values()))[REFERENCE]["bias"])
    for attribute in attributes:
        sections += [_rows(f"{attribute.capitalize()}, {part}", rows, attribute) for part, rows in parts.items()]
        if len(parts) > 1:
            sections.append(_reach(*parts.values(), attribute))
    about = {"prompts": f"{found['prompts']} × {found['images']} images", "model": found["model"]}
    about |= {"target": found["target"], "adapter": found["adapter"] or "none", "settings": " ".join(found["settings"])}
    return Page("Other languages", LEAD, sections, NOT_SHOWN, command, about)


def _shown(name: str) -> str:
    """Return the name of a list's file as the name of a language."""
    return name if name in (REFERENCE, LEFT_OUT, SAME) else name.replace("_", " ").capitalize()


def kept_of(rows: dict[str, dict], name: str) -> tuple[float, tuple[float, float]] | None:
    """Return the share of the occupation's effect on CLIP-T that a row keeps, by `fairdiff.studies.languages.kept`."""
    return kept(*(rows[one]["clip_t"] for one in (name, LEFT_OUT, REFERENCE)))


def reading_of(rows: dict[str, dict], name: str, attribute: str) -> str:
    """Return the reading of a row in words."""
    change = differences(*(rows[one]["bias"][attribute]["values"] for one in (name, REFERENCE)))
    return reading(kept_of(rows, name), mean_interval(change[~np.isnan(change)]))


def _rows(title: str, rows: dict[str, dict], attribute: str) -> Section:
    table, curves = [], {}
    reference = rows[REFERENCE]
    for name, row in rows.items():
        values, missing = row["bias"][attribute]["values"], row["no_face"]
        no_face = f"{percent(missing['rate'])} {interval(missing['ci95'], percent)}".rstrip()
        cells = [name, mean_cell(values), mean_cell(row["clip_t"]), no_face]
        if name == REFERENCE:
            table.append([*cells, "–", "100\u00a0%", "–"])
        else:
            said = "–" if name == LEFT_OUT else reading_of(rows, name, attribute)
            to_english = apart_cell(values, reference["bias"][attribute]["values"])
            table.append([*cells, to_english, _kept_cell(rows, name), said])
        known = np.array(values, float)
        known = known[~np.isnan(known)]
        if len(known):
            ends = mean_interval(known) if len(known) > 1 else (None, None)
            at = float(np.mean(row["clip_t"]))
            tip = f"{name}: bias {mean_cell(values)}, CLIP-T {number(at)}, no face {no_face}"
            curves[name] = [Point(at, float(known.mean()), *ends, tip)]
    floor = reference["bias"][attribute]["floor"]
    charts = [curves_chart(curves, f"{attribute} bias", "CLIP-T with the English text", floor)] if curves else []
    head = ["prompts", f"{attribute} bias", "CLIP-T", "no face", "bias, to English", "of the occupation", "reading"]
    ignored = [name for name in _languages(rows) if reading_of(rows, name, attribute).startswith("ignored")]
    said = f"Ignored the prompt: {', '.join(ignored)}. Their bias says nothing about fairness." if ignored else ""
    text = [f"Noise floor of the bias: {number(floor)}.", *([said] if said else [])]
    return Section(title, text, head, table, charts)


def _languages(rows: dict[str, dict]) -> list[str]:
    return [name for name in rows if name not in (REFERENCE, LEFT_OUT)]


def _kept_cell(rows: dict[str, dict], name: str) -> str:
    found = kept_of(rows, name)
    return "–" if found is None else f"{percent(found[0])} {interval(list(found[1]), percent)}".rstrip()


def _reach(without: dict[str, dict], adapted: dict[str, dict], attribute: str) -> Section:
    """Return the section that shows whether an adapter trained on English changes the bias in other languages."""
    rows = []
    for name in adapted:
        before, after = (part[name]["bias"][attribute]["values"] for part in (without, adapted))
        clip_t = apart_cell(adapted[name]["clip_t"], without[name]["clip_t"])
        said = "–" if name in (REFERENCE, LEFT_OUT) else reading_of(adapted, name, attribute).partition(",")[0]
        rows.append([name, mean_cell(before), mean_cell(after), apart_cell(after, before), clip_t, said.partition(";")[0]])
    head = ["prompts", "without", "with", "change", "change of CLIP-T", "with the adapter"]
    text = ["The adapter was trained on English prompts. Changes are paired, on the same noise."]
    return Section(f"{attribute.capitalize()}: does the adapter reach other languages?", text, head, rows)
