"""The estimand for which a number of audit.json is shown: prompts like these, or these prompts if they are too few.

audit.json contains `ESTIMANDS`, the definition of each number.
"""

from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.verdict import FEW_PROMPTS

TAGS = {"within": "on target", "beyond": "off target", "undecided": "not decided"}
VERDICTS = {
    "within": "the whole interval lies below {delta:.2f}, with pictures without a face counted as the worst case",
    "beyond": "the whole interval lies above {delta:.2f}, with pictures without a face counted as the best case",
    "undecided": "it takes more prompts or pictures to tell on which side of {delta:.2f} it lies",
}
LARGEST_COUNTS = "the largest face of a picture counts, the others are ignored"  # rule for images with several faces
SEVERAL_REFUSED = "a picture with several faces counts as one without a face"
FEW = "*"  # marks an interval that holds for these prompts only
ESTIMANDS = {
    "ci95": "95 % interval for the population that the prompts are a sample of (prompts like these): bootstrap-t over "
    f"prompts, never narrower than ci95_these; null with fewer than {ENOUGH} prompts. No sample reliably shows a bias that "
    "only one prompt in a hundred has",
    "ci95_these": "95 % interval for these prompts with new noise",
    "bias.mean": "mean over prompts of the plug-in bias at this number of images; its noise floor is not 0",
    "bias.sd_over_prompts": "spread of the per-prompt bias, not a standard error",
    "bias.floor": "bias that a perfectly fair generator shows on average at the same numbers of faces",
    "bias.missing_face_bounds": "mean bias if the pictures without a face showed the best or the worst classes",
    "bias.worst_tenth": "mean over the tenth of the prompts with the largest bias. Its floor is larger than that of the "
    "mean, because some prompts are off by chance. It has no interval, because the same images choose the prompts",
    "shares": "mean share over prompts; ratio: share over mean target share, flagged below four fifths. A class is certainly "
    "below four fifths if its ci95_all is, and all classes are certainly above if every ci95 is",
    "target.total_variation": "mean over prompts of half the sum of absolute differences to the prompt's target. Its floor "
    "is what a generator exactly on each target shows on average at the same numbers of faces, and is not 0",
    "target.distance": "D, root mean square over prompts of the chi-squared distance sum_k (p_k - t_k)^2 / t_k of a "
    "prompt's true shares p to its target t, with the noise of the images removed (floor 0). ci95_these is an inverted test, "
    "simulated from empirical-Bayes shares",
    "target.verdict": "for prompts like these; verdict_these is for these prompts. within: the whole interval lies below "
    "delta, with pictures without a face as the worst case; wrong at most 5 % of the time at D = delta. beyond: the whole "
    "interval lies above delta, with them as the best case. Otherwise undecided. On corrected shares if errors were counted",
    "target.prompts_certain": "how many prompts are certainly off (the whole interval of their own D lies above delta), "
    "within (below it) or open. In 95 % of audits none is wrongly called off or within. images_for_within: with fewer "
    "pictures of a prompt none can be called within",
    "per_prompt.target.distance": "D of the observed shares, noise included. ci95_all holds for all prompts at once: Clopper "
    "and Pearson's exact box at .05 / prompts, with missing faces of any class, corrected if the judge's errors were counted",
    "target.p_holm": "exact binomial (two classes) or Monte Carlo G test of the prompt's target, Holm over prompts. If the "
    "judge's errors were counted, the null is what it would report on target, averaged over the uncertainty of the counts; "
    "if they cannot be corrected, uncorrected shares are tested",
    "per_prompt.bias.ci95": "the prompt's own true bias: Wilson (two classes) or Goodman's simultaneous region",
    "corrected": "corrected for the judge's errors on labelled faces, which are assumed to be the same on generated faces. "
    "Intervals include the uncertainty of the counts (Dirichlet, zero cells included); floors are larger",
    "families": "the same over the prompts of one family; their intervals are for that family, not for a comparison",
    "low_confidence.rate": "faces whose most probable class has a probability below .9, all prompts pooled. Labels of such "
    "faces can hide or create bias. Wilson, for these prompts and new noise",
    "wordings": "mean shares over prompts with only one wording of a zero-shot judge, which shows how much its words matter",
    "no_face.rate": "pictures without a face, all prompts pooled; Wilson, for these prompts and new noise",
    "several_faces.rate": "pictures in which the detector found several faces, all prompts pooled; Wilson, as no_face.rate; "
    "null where it does not count them",
    "left_out": "prompts for which one of the models shows fewer than two faces. They are in no mean of shares, before or "
    "after, but in the verdict and the bounds",
    "paired": "after minus before on the same prompts and noise. bias and total_variation are compared at equal numbers of "
    "faces: for each prompt, the model with more faces is averaged over all subsets of the other's size",
    "trained": "after minus start (the untrained adapter, if it changes images), computed as paired: the effect of training",
    "paired.drift": "for an attribute without a target: the change of its bias and of each class's uncorrected mean share. "
    "stayed_within is yes if every interval lies within the margin, and no if that of the bias or one of ci95_all lies "
    "outside. Prompts that exchange their shares are not noticed. stayed_within_these uses ci95_these",
    "ci95_all": "as ci95, but for all classes of the attribute at once (.05 / classes each for more than two); "
    "ci95_all_these: the same for these prompts",
    "clip_t, clip_i, dino, between_seeds, named.kept": "means over prompts (subjects); ci95: Student's over prompts",
    "guidance": "bias.mean and target.total_variation at other guidance scales, with the same prompts and noise",
    "named.kept": "share of the faces that show the class named in their prompt; mean over subjects",
    "without_people.relative_drift": "mean drift (1 - cosine to the image before) over the mean distance between two "
    "seeds; Student's interval of the linearised ratio",
}


def verdict_of(audit: dict, target: dict) -> dict:
    """Return the verdict that is shown: for prompts like these, or with too few prompts for these prompts, tagged so.

    Keys: verdict, tag (the verdict in words) and why. If no verdict is possible at all, why is the reason.
    """
    few = audit["prompts"] < audit["prompts_needed"]
    found = target["verdict_these"] if few else target["verdict"]
    why = VERDICTS[found].format(delta=target["delta"])
    reason = target["reason"] or ""
    if reason and not reason.startswith(FEW_PROMPTS):
        why = reason
    elif few:
        why += f"; {'' if found == 'undecided' else 'this holds for these prompts, '}{reason}"
    return {"verdict": found, "tag": TAGS[found] + (", these prompts" if few else ""), "why": why}


def stayed_of(drift: dict) -> str:
    """Return whether an untargeted attribute stayed within its margin, for these prompts if they are too few."""
    return drift["stayed_within_these" if len(ends_of(drift) or []) > 2 else "stayed_within"]


def ends_of(entry: dict) -> list | None:
    """Return the interval that is shown: for prompts like these, or with too few prompts for these, marked by FEW."""
    if "ci95" not in entry:
        return None
    if entry["ci95"] is None or entry["ci95"][0] is None:
        these = entry.get("ci95_these")
        return entry["ci95"] if these is None or these[0] is None else [*these, FEW]
    return entry["ci95"]


def ends_of_all(entry: dict) -> list | None:
    """Return the interval that is shown, like `ends_of`, of those that hold for all classes at once."""
    return ends_of({"ci95": entry["ci95_all"], "ci95_these": entry["ci95_all_these"]})


def why_not_corrected(audit: dict, names: list[str]) -> str:
    """Return why the shares of these attributes are uncorrected, as a clause to put inside a sentence."""
    return audit["judge"].get("not_corrected") or f"this judge's errors were never measured for {', '.join(names)}"
