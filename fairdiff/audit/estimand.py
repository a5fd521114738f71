"""Which estimand a number of audit.json is shown for: prompts like these, or these prompts where they are too few."""

TAGS = {"within": "on target", "beyond": "off target", "undecided": "not decided"}
VERDICTS = {
    "within": "the whole interval lies below {delta:.2f}, with missing faces at their worst",
    "beyond": "the whole interval lies above {delta:.2f}, with missing faces at their best",
    "undecided": "more prompts or pictures are needed to tell on which side of {delta:.2f} it lies",
}
FEW = "*"  # behind an interval that holds for these prompts only


def verdict_of(audit: dict, target: dict) -> dict:
    """The verdict that is shown: of prompts like these, or with too few prompts that of these prompts, named so.

    verdict, tag in words, and why. A reason against both makes it undecided.
    """
    few = audit["prompts"] < audit["prompts_needed"]
    found = target["verdict_these"] if few else target["verdict"]
    why = VERDICTS[found].format(delta=target["delta"])
    if target["reason"] and not (few and target["verdict_these"] != "undecided"):
        why = target["reason"]
    elif few:
        why += f"; this holds for these prompts, {target['reason']}"
    return {"verdict": found, "tag": TAGS[found] + (", these prompts" if few else ""), "why": why}


def stayed_of(drift: dict) -> str:
    """Whether an untargeted attribute stayed; of these prompts where they are too few to speak of others."""
    return drift["stayed_within_these" if len(ends_of(drift) or []) > 2 else "stayed_within"]


def ends_of(entry: dict) -> list | None:
    """The interval that is shown of a number: for prompts like these; with too few prompts for these, marked by FEW."""
    if "ci95" not in entry:
        return None
    if entry["ci95"] is None or entry["ci95"][0] is None:
        these = entry.get("ci95_these")
        return entry["ci95"] if these is None or these[0] is None else [*these, FEW]
    return entry["ci95"]


def ends_of_all(entry: dict) -> list | None:
    """The same of the interval that holds for all classes at once."""
    return ends_of({"ci95": entry["ci95_all"], "ci95_these": entry["ci95_all_these"]})
