"""Which audits can be compared, why others cannot, and what a pair shares: only prompts, or also the noise."""

from collections.abc import Sequence

from fairdiff.audit.read import PROMPT_PARTS
from fairdiff.audit.wording import last_model
from fairdiff.compare.audits import Audited
from fairdiff.errors import FairDiffError

LOOKING = ("detector", "crop", "CLIP", "image encoder")  # keys of the provenance: what looks at images beside the judge
SAME, NOISE, PROMPTS = "the same pictures", "prompts and noise", "prompts"


def require_comparable(audits: Sequence[Audited]) -> None:
    """FairDiffError that names the first audit which does not compare with the first of all, and why."""
    for other in audits[1:]:
        if reason := why_not(audits[0].audit, other.audit):
            raise FairDiffError(
                f"{other.folder}: cannot be compared with {audits[0].folder}: {reason}; allowed: audits of the same "
                "attributes, targets, prompts, number of pictures and judge"
            )


def why_not(one: dict, other: dict) -> str | None:
    """Why the numbers of two audit.json do not compare, None where they do."""
    names = [list(audit["attributes"]) for audit in (one, other)]
    if {*names[0]} != {*names[1]}:
        return f"other attributes ({', '.join(names[1])}, there {', '.join(names[0])})"
    for name, classes in one["attributes"].items():
        if other["attributes"][name] != classes:
            return f"other classes of {name} ({', '.join(other['attributes'][name])}, there {', '.join(classes)})"
    prompts = [{p["prompt"] for p in _entries(audit)[0][1]["per_prompt"]} for audit in (one, other)]
    if prompts[0] != prompts[1]:
        return f"other prompts ({len(prompts[1])}, there {len(prompts[0])}, {len(prompts[0] & prompts[1])} in common)"
    return _other_target(one, other) or _other_pictures(one, other) or _other_judge(one, other)


def _entries(audit: dict) -> list[tuple[str, dict]]:
    model = last_model(audit)
    return [(name, entry) for part in PROMPT_PARTS for name, entry in sorted(model[part].items())]


def _other_target(one: dict, other: dict) -> str | None:
    for (name, first), (_, second) in zip(_entries(one), _entries(other), strict=True):
        targets = [entry["target"] for entry in (first, second)]
        if targets[0]["requested"] != targets[1]["requested"]:
            return f"{name} has a target in one of them only"
        if targets[0]["delta"] != targets[1]["delta"]:
            return f"other margin of the verdict ({targets[1]['delta']:g}, there {targets[0]['delta']:g})"
        shares = [{p["prompt"]: p["target"]["shares"] for p in entry["per_prompt"]} for entry in (first, second)]
        for prompt, wanted in shares[0].items():
            if any(abs(wanted[cls] - share) > 1e-6 for cls, share in shares[1][prompt].items()):
                return f"other target of {name} ({_shares(shares[1][prompt])}, there {_shares(wanted)}: {prompt})"
    return None


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{cls} {share:.3g}" for cls, share in shares.items())


def _other_pictures(one: dict, other: dict) -> str | None:
    images = [audit["images_per_prompt"] for audit in (one, other)]
    if images[0] != images[1]:
        return f"other number of pictures of a prompt ({images[1]}, there {images[0]}): noise adds to bias by it"
    return None


def _other_judge(one: dict, other: dict) -> str | None:
    made = [audit["provenance"] for audit in (one, other)]
    if made[0]["several_faces"] != made[1]["several_faces"]:
        return f"other count of several faces ({made[1]['several_faces']}; there: {made[0]['several_faces']})"
    if made[0]["hashes"]["judge"] != made[1]["hashes"]["judge"]:
        if one["judge"]["path"] != other["judge"]["path"]:
            return f"other judge ({other['judge']['path']}, there {one['judge']['path']})"
        changed = [key for key in LOOKING if made[0].get(key) != made[1].get(key)]
        return f"other {' and '.join(changed)}" if changed else "other weights of the judge, the detector or an encoder"
    confusions = [
        {name: entry["corrected"]["confusion"] for name, entry in _entries(audit) if entry.get("corrected")}
        for audit in (one, other)
    ]
    return "other counted errors of the judge" if confusions[0] != confusions[1] else None


def pairing(one: Audited, other: Audited) -> tuple[str, str]:
    """What the images of two audits that compare have in common, and why they have no more, "" where they have all.

    Noise is paired by (prompt, seed, number of the image, size of the image).
    """
    made = [some.audit["provenance"] for some in (one, other)]
    seeds = [some.audit_seed for some in (one, other)]
    hashes = [some["hashes"].get(audited.last) for some, audited in zip(made, (one, other), strict=True)]
    if seeds[0] == seeds[1] and hashes[0] is not None and hashes[0] == hashes[1]:
        return SAME, ""
    if any("pictures" in some for some in made):
        return PROMPTS, "given pictures have no common noise"
    if seeds[0] != seeds[1]:
        return PROMPTS, f"other audit seeds ({seeds[0]} and {seeds[1]})"
    sizes = [some.get("image_size") for some in made]
    if sizes[0] != sizes[1]:
        return PROMPTS, f"pictures of other sizes ({sizes[0]} and {sizes[1]})"
    if one.rows is None or other.rows is None:
        return PROMPTS, "an audit has no records.parquet beside audit.json"
    return NOISE, ""
