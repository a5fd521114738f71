"""How much more one run leaves than another, prompt by prompt: the mean difference, 95 % interval over prompts.

python scripts/paired.py outputs/a/seed0/audits/*/audit.json outputs/b/seed0/audits/*/audit.json
python scripts/paired.py one/audit.json other/audit.json --attribute gender×race --of target

Reads audit.json or a record of docs/measurements/results. `bias` is each prompt's, [0, 1]; `target` its total variation to
the target, [0, 1]; of perceived presentation, after training. A prompt without a face in either says nothing.
"""

import argparse
from pathlib import Path

import numpy as np
from reproduce.numbers import entry, mean_interval, signed

from fairdiff.audit.read import COUNT, NUMBER, TEXT, Each, Maybe, read_shape
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError

KEYS = {"bias": "value", "target": "total_variation"}
PROMPT = {"family": TEXT, "prompt": Maybe(TEXT), "bias": {"value": NUMBER}, "target": {"total_variation": NUMBER}}
MODEL = dict.fromkeys(("attributes", "joint"), Each({"per_prompt": [PROMPT]}))
AUDIT = {"models": Each(MODEL), "provenance": {"seed": COUNT}}


def read(path: Path) -> dict:
    """An audit, or the record of one, with a model after training; FairDiffError for any other file."""
    audit = read_shape(path, AUDIT)
    if "after" not in audit["models"]:
        found = ", ".join(audit["models"]) or "none"
        raise FairDiffError(
            f"{path}: models: found {found}, allowed: an audit with after, of a training or an adapter.path"
        )
    return audit


def paired(one: dict, other: dict, attribute: str, of: str) -> tuple[float, float, float, int]:
    """Mean of other less one over their prompts, low, high, and of how many prompts. ValueError if these are not the same."""
    rows = []
    for audit in (one, other):
        known = entry(audit, "after")
        if attribute not in known:
            raise ValueError(f"--attribute {attribute}: allowed: {', '.join(known)}")
        rows.append(known[attribute]["per_prompt"])
    for key in ("family", "prompt"):  # a record has no texts: its prompts stand in the order of the audit's
        settings = [[p.get(key) for p in some] for some in rows]
        if settings[0] != settings[1] and None not in settings[0] + settings[1]:
            raise ValueError(f"the runs were audited on other prompts ({len(rows[0])} and {len(rows[1])})")
    pairs = np.array([[(p.get(of) or {}).get(KEYS[of]) for p in some] for some in rows], float).T
    differences = np.diff(pairs[~np.isnan(pairs).any(1)]).ravel()
    if not len(differences):
        raise ValueError(f"--of {of}: no prompt has it in both runs")
    low, high = mean_interval(differences, seed=one["provenance"]["seed"])
    return float(differences.mean()), float(low), float(high), len(differences)


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--attribute", default="gender")
    parser.add_argument("--of", choices=KEYS, default="bias")
    args = parser.parse_args(argv)
    try:
        mean, low, high, count = paired(read(args.one), read(args.other), args.attribute, args.of)
    except (FairDiffError, OSError, ValueError) as error:
        fail(error)
    print(f"{args.attribute}, {args.of}: {signed(mean)} [{signed(low)}, {signed(high)}] over {count} prompts")


if __name__ == "__main__":
    main()
