"""The candidates among which the settings of Portraits were chosen, and their table."""

import shlex
from pathlib import Path

from fairdiff.files import write_text
from reproduce.aims import drift
from reproduce.numbers import entry, number, percent
from reproduce.plan import Run
from reproduce.records import read_records

VALIDATION = ("audit.split=validation", "audit.prompts=16", "audit.images_per_prompt=60")  # of different occupations
TEXT, TOKENS = ("adapter=lora_text",), ("adapter=soft_tokens",)
FAST = ("steps=120",)
SHARE = "loss.image={}"
CANDIDATES = {
    "text, rate 6e-3": (*TEXT, *FAST, "adapter.learning_rate=6e-3", SHARE.format(0.17)),
    "text, rate 1.2e-2": (*TEXT, *FAST, "adapter.learning_rate=1.2e-2", SHARE.format(0.17)),
    "text, rate 2.4e-2": (*TEXT, *FAST, "adapter.learning_rate=2.4e-2", SHARE.format(0.17)),
    "text, image share .4": (*TEXT, *FAST, "adapter.learning_rate=1.2e-2", SHARE.format(0.4)),
    "text, image share .85": (*TEXT, *FAST, "adapter.learning_rate=1.2e-2", SHARE.format(0.85)),
    "tokens, rate 3e-2": (*TOKENS, *FAST, "adapter.learning_rate=3e-2", SHARE.format(0.17)),
}
HEAD = """# How the settings were chosen

Written by `python scripts/search.py`: one training each, seed 0, audited on validation occupations by the audit classifier.
Test occupations took no part. Labels are perceived presentation in images, never identity.

Bias: mean over prompts with its 95 % interval over prompts. Change: after minus before of an attribute without a target.
Low confidence: faces of whose gender the classifier is less than 90 % sure, before and after. Moved: images without people.

Chosen: "text, image share .4" and, for soft tokens, the rate of "tokens, rate 3e-2". Soft tokens now run with the image share
.4 too, which has not been measured for them, nor have the settings of the two U-Net adapters on this model. A rate of 2.4e-2
breaks the images. Sixteen occupations do not tell differences of .05 apart; more steps and other ranks have not been tried.

| candidate | gender bias | change of race bias | change of age bias | low confidence | DINO | moved |
|---|---|---|---|---|---|---|
"""


def candidates() -> list[Run]:
    return [Run("search", name, (*own, *VALIDATION), 0) for name, own in CANDIDATES.items()]


def write_search(runs: list[Run], records: Path, page: Path) -> None:
    """The table of the candidates that have a record, with their commands below it."""
    audits = read_records(runs, records)
    rows = [_row(run, audits[run]) for run in runs if run in audits]
    lines = [f"- {run.name}: `{shlex.join(['python', 'train.py', *run.overrides])}`" for run in runs if run in audits]
    write_text(page, HEAD + "\n".join(rows) + "\n\n" + "\n".join(lines) + "\n")


def _row(run: Run, audit: dict) -> str:
    before, after = (entry(audit, model)["gender"] for model in ("before", "after"))
    low, high = after["bias"]["ci95"]
    bias = f"{number(before['bias']['mean'])} → {number(after['bias']['mean'])} [{number(low)}, {number(high)}]"
    changes = [str(drift(axis)([audit])) for axis in ("race", "age")]
    unsure = " → ".join(percent(e["unsure"]["rate"], 1) for e in (before, after))
    cells = [bias, *changes, unsure, number(audit["models"]["after"]["dino"]["mean"])]
    return f"| {run.name} | {' | '.join(cells)} | {number(audit['unrelated']['ratio']['value'])} |"
