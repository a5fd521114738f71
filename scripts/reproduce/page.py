"""Write docs/results.md and its figure from the existing records."""

from pathlib import Path

import matplotlib.pyplot as plt

from fairdiff.files import write_text
from reproduce.aims import aims_table
from reproduce.numbers import (
    ends,
    entry,
    excess,
    number,
    per_prompt,
    percent,
    seeds_interval,
    seeds_spread,
    signed,
    stays,
)
from reproduce.plan import GROUPS, Run
from reproduce.records import AXES, read_records

HEAD = """# Results

Written by `python scripts/results.py` from the audits made so far, on the embedded model ([portraits.md](portraits.md)).
Settings were chosen on validation occupations ([search.md](search.md)). The test occupations of this page were not used to
choose a setting, but an audit of the earlier default adapter had shown 24 of them. The audit classifier never took part in
training. Labels are perceived presentation in images, never identity.

- **Bias** is the paper's: 2 / (K (K - 1)) sum |f_i - f_j| of a prompt's shares, then the mean over prompts. Its noise floor
  is the bias of a perfectly fair generator at that number of images.
- **[low, high]** is a 95 % interval over prompts, and also over seeds if there are several. For no face, CLIP and relative
  drift it is the mean of the seeds' intervals. ± is the standard deviation over seeds.
- **Old** is the mean share of old people. **Low confidence** is the share of faces whose gender the classifier is less than
  90 % sure of. **Relative drift** is the distance of images without people to those before, divided by the distance between
  two seeds. **CLIP-T** is after minus before. **Named class kept** is the share of faces that show the class named in the
  prompt, after training.
- The runs "without prompts that name a class" were made before `prompts.named` existed. Their settings were those of the
  commands given here, but their first step had a random direction (CHANGELOG, "The balance of the loss").
- Commands sample in bfloat16 if the processor supports it. Those that end in `model.sampling_dtype=float32` were run on a
  processor that does not; elsewhere they need that setting to give the same digits.
- Rounding changes a run, because each step amplifies it. lora_both ran with one thread (`--jobs 2` on two cores). With two
  threads, the same command and seed gave a gender bias of .369 in place of .304.
"""
PAPER = """
For comparison, this is the paper's table for Stable Diffusion 1.5 (Shen et al., ICLR 2024; 10,000 steps and more, LoRA of
rank 50). Its ± is the spread over prompts, not an error. Its CLIP and DINO are other networks, so only bias is comparable:

| debiased for | gender | race | gender×race | CLIP-I | DINO |
|---|---|---|---|---|---|
| nothing | .67 ± .29 | .42 ± .06 | .21 ± .03 | – | – |
| gender | .23 ± .16 | .44 ± .06 | .20 ± .03 | .77 | .70 |
| race | .74 ± .27 | .12 ± .05 | .14 ± .03 | .73 | .67 |
| gender×race | .16 ± .13 | .09 ± .04 | .06 ± .02 | .67 | .58 |
| gender×race, age 75/25 | .15 | .09 | .06 | .66 | .58 |
"""


def write_page(runs: list[Run], records: Path, page: Path) -> None:
    """Write the page from the existing records; runs without a record are listed."""
    audits = read_records(runs, records)
    of_run: dict[tuple[str, str], list[dict]] = {}
    for run, audit in audits.items():
        of_run.setdefault((run.group, run.name), []).append(audit)
    parts = [HEAD, *aims_table(of_run)]
    for group, title in GROUPS.items():
        names = list(dict.fromkeys(run.name for run in runs if run.group == group))
        found = {name: of_run.get((group, name), []) for name in names}
        planned = {name: sum((r.group, r.name) == (group, name) for r in runs) for name in names}
        parts.append(f"\n## {title}\n")
        measured = {name: those for name, those in found.items() if those}
        if measured:
            if group == "frontier":
                parts += _figure(measured, page)
            else:
                words = {run.name: audit for run, audit in audits.items() if run.group == "words"}
                parts += _words(measured) if group == "words" else _table(measured, planned, words)
            parts += _families(measured) if group == "experiments" else _targets(measured) if group == "targets" else []
            parts.append(_commands({run: audit for run, audit in audits.items() if run.group == group}))
        missing = [name for name in names if name not in measured]
        if missing:
            parts.append(f"\nNo record: {_brief(missing)}.\n")
        if group == "experiments":
            parts.append(PAPER)
    write_text(page, "".join(parts))


def _table(found: dict[str, list[dict]], planned: dict[str, int], words: dict[str, dict]) -> list[str]:
    """Return the tables of a group's runs, with the baselines by words alone first."""
    head = ["run", "seeds", "prompts × images", *(f"{axis} bias" for axis in AXES), "old"]
    lines = [_cells(head), "|" + "---|" * len(head), *_baselines(words)]
    lines += [_cells(_row(name, audits, planned[name])) for name, audits in found.items()]
    floors = entry(next(iter(found.values()))[0], "before")
    sizes = {a["images_per_prompt"] for audits in found.values() for a in audits}
    if len(sizes) == 1:
        shown = [f"{axis} {number(floors[axis]['bias']['floor'])}" for axis in AXES if axis in floors]
        lines.append(f"\nFloors: {', '.join(shown)}.")
    head = ["run", "no face", "low confidence", "CLIP-T", "CLIP-I", "DINO", "relative drift", "named class kept"]
    lines += ["", _cells(head), "|" + "---|" * len(head)]
    lines += [_cells(_kept(name, audits)) for name, audits in found.items()]
    return ["\n", "\n".join(lines), "\n"]


def _baselines(words: dict[str, dict]) -> list[str]:
    """Return a row for every wording: the model with the training prompts (the first wording), then with this wording."""
    rows = []
    for name, audit in list(words.items())[1:]:
        before, after = entry(next(iter(words.values())), "before"), entry(audit, "before")
        cells = [f"words: {name}", "–", f"{audit['prompts']} × {audit['images_per_prompt']}"]
        for axis in AXES:
            bias = after[axis]["bias"] if axis in after else None
            span = f"[{', '.join(map(number, ends(bias)))}]" if bias else ""
            cells.append(f"{number(before[axis]['bias']['mean'])} → {number(bias['mean'])} {span}" if bias else "–")
        rows.append(_cells([*cells, seeds_interval([after["age"]["shares"]["old"]], "share")]))
    return rows


def _words(found: dict[str, list[dict]]) -> list[str]:
    """Return the table of the frozen model with words that name no attribute: bias, and the share of it that remains."""
    plain, lines = next(iter(found.values()))[0], []
    for words, (audit, *_) in found.items():
        cells = [words, f"{audit['prompts']} × {audit['images_per_prompt']}"]
        for axis in ("gender", "race", "age"):
            bias = entry(audit, "before")[axis]["bias"]
            part, low, high = stays(audit, plain, axis)
            kept = "" if audit is plain else f"; {percent(part)} stays [{percent(low)}, {percent(high)}]"
            cells.append(f"{number(bias['mean'])} [{', '.join(map(number, ends(bias)))}]{kept}")
        lines.append(_cells(cells))
    head = ["words", "prompts × images", "gender bias", "race bias", "age bias"]
    said = "\nStays is the share of the excess over the noise floor that remains. No wording occurs in training captions.\n"
    return ["\n", "\n".join([_cells(head), "|" + "---|" * len(head), *lines]), "\n", said]


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _families(found: dict[str, list[dict]]) -> list[str]:
    """Return a table by kind of prompt, for the runs that have several kinds."""
    lines = []
    for name, audits in found.items():
        for family, prompts in audits[0]["families"].items() if len(audits[0]["families"]) > 1 else ():
            cells = [str(excess(audits, axis, "bias", "value", family)) for axis in ("gender", "race")]
            lines.append(f"| {name}: {family} | {prompts} | " + " | ".join(cells) + " |")
    head = "| run: kind of prompt | prompts | gender bias | race bias |\n|---|---|---|---|\n"
    said = "\nLeft is the share of the bias before, in excess of its noise floor, that remains.\n"
    return ["\n", head, "\n".join(lines), "\n", said] if lines else []


def _targets(found: dict[str, list[dict]]) -> list[str]:
    """Return the table of the distances to targets that are not uniform."""
    lines = []
    for name, audits in found.items():
        requested = [axis for axis in AXES if axis in (e := entry(audits[0], "after")) and e[axis]["target"]["requested"]]
        lines += [f"| {name} | {axis} | {excess(audits, axis, 'target', 'total_variation')} |" for axis in requested]
    said = "\nTotal variation is half the sum of absolute differences to the prompt's own target, mean over prompts. Left is "
    said += "the share of it, in excess of the noise floor (a generator exactly on target), that remains.\n"
    return ["\n| run | | total variation to the target |\n|---|---|---|\n", "\n".join(lines), "\n", said]


def _brief(names: list[str], most: int = 8) -> str:
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _commands(audits: dict[Run, dict]) -> str:
    """Return the commands of the measured runs. float32 is named, because runs sample in bfloat16 by default if possible."""
    lines = set()
    for run, audit in audits.items():
        more = " model.sampling_dtype=float32" if audit["provenance"]["sampling_dtype"] == "float32" else ""
        lines.add(f"- {run.name}: `{run.shown}{more}`")
    return "\n" + "\n".join(sorted(lines)) + "\n"


def _row(name: str, audits: list[dict], planned: int) -> list[str]:
    first = audits[0]
    cells = [name, f"{len(audits)} of {planned}", f"{first['prompts']} × {first['images_per_prompt']}"]
    before, after = (entry(first, model) for model in ("before", "after"))
    for axis in AXES:
        if axis not in after:
            cells.append("–")
            continue
        each = [entry(a, "after")[axis] for a in audits]
        spread = seeds_spread([e["bias"]["mean"] for e in each], per_prompt(each), first["provenance"]["seed"])
        cells.append(f"{number(before[axis]['bias']['mean'])} → {spread}")
    ages = [entry(a, "after").get("age") for a in audits]
    cells.append(seeds_interval([age["shares"]["old"] for age in ages if age], "share"))
    return cells


def _kept(name: str, audits: list[dict]) -> list[str]:
    """Return a row of untargeted changes: faces, match with the prompt, semantics, images without people."""

    def one_digit(rate: float) -> str:
        return percent(rate, digits=1)

    after = [a["models"]["after"] for a in audits]
    return [
        name,
        seeds_interval([m["no_face"] for m in after], "rate", one_digit),
        seeds_interval([m["attributes"]["gender"]["low_confidence"] for m in after], "rate", one_digit),
        seeds_interval([a["paired"]["clip_t"] for a in audits], "difference", signed),
        *(seeds_interval([m[key] for m in after], "mean") for key in ("clip_i", "dino")),
        seeds_interval([a["without_people"]["relative_drift"] for a in audits], "value"),
        "; ".join(f"{axis} {_named(audits, axis)}" for axis in audits[0].get("named") or ()) or "–",
    ]


def _named(audits: list[dict], axis: str) -> str:
    """Return the share of faces after training that show the class of this attribute named in their prompt."""
    return seeds_interval([a["named"][axis]["after"] for a in audits if a.get("named")], "mean", percent)


def _figure(found: dict[str, list[dict]], page: Path) -> list[str]:
    """Draw gender bias over DINO similarity; each kind of adapter has a line over image shares and one over scales."""
    path = page.parent / "images" / "frontier.png"
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(name.split(",")[0] for name in found))
    for place, kind in enumerate(kinds):
        for what, style in (("image share", "o-"), ("scale", "s--")):
            points = [(name, a[0]) for name, a in found.items() if name.startswith(f"{kind}, {what}")]
            points.sort(key=lambda point: float(point[0].split()[-1]))
            if not points:
                continue
            after = [audit["models"]["after"] for _, audit in points]
            bias = [m["attributes"]["gender"]["bias"] for m in after]
            x, y = [m["dino"]["mean"] for m in after], [b["mean"] for b in bias]
            color = f"C{place}"
            axes.vlines(x, *zip(*map(ends, bias), strict=True), color=color, alpha=0.25, linewidth=1)
            axes.plot(x, y, style, color=color, label=f"{kind}: {what}", markersize=4)
            for (name, _), *point in zip(points, x, y, strict=True):
                label = ("×" if what == "scale" else "") + name.split()[-1]
                axes.annotate(label, point, fontsize=6, xytext=(3, 3), textcoords="offset points")
    before = next(iter(found.values()))[0]["models"]["before"]["attributes"]["gender"]["bias"]
    axes.axhline(before["mean"], color="0.6", linewidth=0.8)
    axes.axhline(before["floor"], color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="DINO-place similarity to the picture before (same noise)", ylabel="gender bias after")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    said = "*12 test occupations with 95 % intervals over them. The lines show the bias before, and the noise floor.*"
    return [f"\n![bias against semantics](images/{path.name})\n\n{said}\n"]
