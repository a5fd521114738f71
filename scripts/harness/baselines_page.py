"""Build the page of scripts/baselines.py from its records."""

from fairdiff.audit.estimand import ends_of
from fairdiff.audit.wording import interval, number, percent, signed, targeted
from fairdiff.studies.page import Page, Point, Section, curves_chart

LEAD = (
    "This page compares methods without training with adapters. All are audited with the same prompts, noise and "
    "judge. Labels are perceived presentation in images, never identity."
)
METHODS = (
    "The ethical intervention appends \", if all individuals can be a nurse irrespective of their gender\" to the "
    "prompt (Bansal et al. 2022). Random phrases add a class in words to the prompt of every image, drawn from the "
    "target; Fair Diffusion (Friedrich et al. 2023) does the same by guidance. UCE edits the cross-attention in "
    "closed form (Gandikota et al. 2024). Here its strength comes from text embeddings, while the paper generates "
    "images to find it. debiasVL projects the text embedding (Chuang et al. 2023). The projection is folded into the "
    "weights, so it acts on the unconditional branch too.",
    "Bias is the mean over prompts of the gap between classes; 0 is parity. A change is after minus before, paired. "
    "[low, high] is a 95 % interval for prompts like these; a star marks intervals for these prompts only, because "
    "they are too few. Image encoder is the similarity to the image before with the same noise. Named class kept is "
    "the share of faces that show the class which their prompt names. Relative drift is that of images without "
    "people, divided by the distance between two seeds.",
)
NOT_SHOWN = (
    "How the methods compare at equal semantics: this page has one setting of each, and `scripts/frontier.py` has the "
    "curves.",
    "Spread over seeds: closed-form methods have no seed, and each was audited with one noise.",
    "Other models: the numbers are for the embedded model, whose bias was made on purpose.",
    "UCE as its authors tune it, by generating images until the shares are right.",
)


NAMES = ("ethical intervention", "random phrases", "UCE", "debiasVL")


def page(found: dict[str, dict[str, dict]]) -> Page:
    """Return the page. found: split -> method -> the record of its audit."""
    sections = [Section("Methods", METHODS)]
    for split, methods in found.items():
        suites = {}
        for name, kept in methods.items():
            suites.setdefault((kept["prompts"], kept["images_per_prompt"]), {})[name] = kept
        for (prompts, images), some in suites.items():
            sections += _sections(some, f"{split.capitalize()} prompts: {prompts} × {images} images")
    settings = {" ".join(kept["settings"]) for methods in found.values() for kept in methods.values()}
    commands = [f"python scripts/baselines.py{_options(text)}" for text in sorted(settings)]
    return Page("Baselines without training", LEAD, sections, NOT_SHOWN, "; ".join(commands))


def _options(settings: str) -> str:
    """Return the options of the command that gives these settings: --test and --set."""
    split, _, others = settings.partition(" ")
    return (" --test" if split.endswith("=test") else "") + (f" --set {others}" if others else "")


def _sections(methods: dict[str, dict], title: str) -> list[Section]:
    first = next(iter(methods.values()))
    names = targeted(first)
    others = [name for name in first["models"]["after"]["attributes"] if name not in names]
    head = ["method", *(f"{n} bias" for n in names), *(f"change of {n} bias" for n in names + others)]
    rows = [["nothing", *(_valued(first["models"]["before"]["attributes"][n]["bias"]) for n in names)]]
    rows[0] += ["–"] * (len(head) - len(rows[0]))
    for name, kept in methods.items():
        after = kept["models"]["after"]["attributes"]
        changes = [_changed(kept["paired_bias"][n]) for n in names + others]
        rows.append([name, *(_valued(after[n]["bias"]) for n in names), *changes])
    missing = [name for name in NAMES if name not in methods]
    said = [f"Not measured here: {', '.join(missing)}."] if missing else []
    floors = [f"{n} {number(first['models']['before']['attributes'][n]['bias']['floor'])}" for n in names]
    bias = Section(title, [f"Noise floors: {', '.join(floors)}.", *said], head, rows, [_chart(methods, n) for n in names])
    kept_head = ["method", "image encoder", "CLIP-I", "change of CLIP-T", "low confidence", "no face", "relative drift"]
    kept_head += [f"named {n} kept" for n in first["named"] or {}]
    return [bias, Section("What else changes", (), kept_head, [_kept_row(name, kept) for name, kept in methods.items()])]


def _kept_row(name: str, kept: dict) -> list[str]:
    after = kept["models"]["after"]
    low = after["attributes"][targeted(kept)[0]]["low_confidence"]
    cells = [name, _valued(after["dino"]), _valued(after["clip_i"]), _changed(kept["paired"]["clip_t"])]
    cells += [_valued(low, "rate", percent), _valued(after["no_face"], "rate", percent)]
    cells.append(_valued(kept["without_people"]["relative_drift"], "value"))
    return cells + [_valued(entry["after"], form=percent) for entry in (kept["named"] or {}).values()]


def _valued(entry: dict, key: str = "mean", form=number) -> str:
    return f"{form(entry[key])} {interval(ends_of(entry), form)}".rstrip()


def _changed(entry: dict) -> str:
    return f"{signed(entry['difference'])} {interval(ends_of(entry))}".rstrip()


def _chart(methods: dict[str, dict], attribute: str) -> str:
    """Return a chart of bias over semantics with one point for each method."""
    curves = {}
    for name, kept in methods.items():
        after = kept["models"]["after"]
        bias, seen = after["attributes"][attribute]["bias"], after["dino"]["mean"]
        low, high = (ends_of(bias) or [None, None])[:2]
        tip = f"{name}: bias {_valued(bias)}, image encoder {number(seen)}"
        curves[name] = [Point(seen, bias["mean"], low, high, tip)]
    before = next(iter(methods.values()))["models"]["before"]["attributes"][attribute]["bias"]
    curves["nothing"] = [Point(1.0, before["mean"], *(ends_of(before) or [None, None])[:2], "nothing")]
    across = "similarity to the image before, same noise (image encoder)"
    return curves_chart(curves, f"{attribute} bias", across, before["floor"])
