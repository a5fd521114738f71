"""The estimand for which a number of audit.json is shown: prompts like these, or these prompts if they are too few.

audit.json contains `ESTIMANDS`, the definition of each number.
"""

from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.verdict import FEW_PROMPTS

TAGS = {"within": "on target", "beyond": "off target", "undecided": "not decided"}
VERDICTS = {
    "within": "the whole interval lies below {delta:.2f}, with missing faces at their worst",
    "beyond": "the whole interval lies above {delta:.2f}, with missing faces at their best",
    "undecided": "more prompts or pictures are needed to tell on which side of {delta:.2f} it lies",
}
LARGEST_COUNTS = "the largest face of a picture counts, the others are ignored"  # rule for images with several faces
SEVERAL_REFUSED = "a picture with several faces counts as one without a face"
FEW = "*"  # marks an interval that holds for these prompts only
ESTIMANDS = {
    "ci95": "95 % interval for the population that the prompts are a sample of (prompts like these): bootstrap-t over "
    f"prompts, never narrower than ci95_these; null with fewer than {ENOUGH} prompts. No sample sees a bias that one prompt "
    "in a hundred carries",
    "ci95_these": "95 % interval for these prompts with new noise",
    "bias.mean": "mean over prompts of the plug-in bias at this number of images; its noise floor is not 0",
    "bias.sd_over_prompts": "spread of the per-prompt bias, not a standard error",
    "bias.floor": "what a perfectly fair generator shows on average at the same numbers of faces",
    "bias.missing_face_bounds": "mean bias if the pictures without a face had had the best or the worst classes",
    "bias.worst_tenth": "mean of the tenth of the prompts with the largest bias; its floor, what a perfectly fair generator "
    "shows, is larger than that of the mean: some prompts are off by chance. No interval: the same images choose the prompts",
    "shares": "mean share over prompts; ratio: to the mean target share, flagged below four fifths. A class is "
    "certainly below them where its ci95_all is, all are certainly above where every ci95 is",
    "target.total_variation": "mean over prompts of half the absolute differences to the prompt's target; its floor, "
    "the mean of what a generator exactly on each target shows at the same numbers of faces, is not 0",
    "target.distance": "D, root mean square over prompts of the chi-squared distance sum_k (p_k - t_k)^2 / t_k of a "
    "prompt's true shares p to its target t, estimated without the noise of the images (floor 0); these: inverted test, "
    "worlds from empirical-Bayes shares",
    "target.verdict": "of prompts like these, verdict_these: of these prompts. within: the whole interval below delta, wrong "
    "at most 5 % of the time at D = delta, with missing faces at their worst; beyond: the whole above delta, with missing "
    "faces at their best; else undecided. On corrected shares where the judge's errors were counted",
    "target.prompts_certain": "how many prompts are certainly off (the whole interval of their own D above delta), within "
    "(below it) or open; in 95 % of audits none is wrongly called off or within. images_for_within: fewer pictures of a "
    "prompt call none within",
    "per_prompt.target.distance": "D of the shares seen, noise included; ci95_all holds for all prompts at once: Clopper and "
    "Pearson's exact box at .05 / prompts, missing faces of any class, and the judge's error undone where it was counted",
    "target.p_holm": "exact binomial (two classes) or Monte Carlo G test of the prompt's target, Holm over prompts. Where "
    "the judge's errors were counted the null is what it would read on target, averaged over what its labelled faces leave "
    "open; where they cannot be undone the shares as judged are tested",
    "per_prompt.bias.ci95": "the prompt's own true bias: Wilson (two classes) or Goodman's simultaneous region",
    "corrected": "the judge's error on labelled faces undone, assumed to be the same on generated ones; intervals hold what "
    "the labelled faces leave open of it (Dirichlet, zero cells included); its floors are larger",
    "families": "the same over the prompts of one family; their intervals are for that family, not for a comparison",
    "low_confidence.rate": "faces whose most probable class has less than .9, all prompts pooled: no class is clear, "
    "and labels of such faces can hide a bias or make one; Wilson, for these prompts and new noise",
    "wordings": "mean shares over prompts if a zero-shot judge had one of its wordings only: how far they are its words'",
    "no_face.rate": "pictures without a face, all prompts pooled; Wilson, for these prompts and new noise",
    "several_faces.rate": "pictures in which the detector found several faces, all prompts pooled; Wilson, as no_face.rate; "
    "null where it does not count them",
    "left_out": "prompts that show fewer than two faces by one of the models: in no mean of shares, before or after, but in "
    "the verdict and the bounds",
    "paired": "after minus before on the same prompts and noise; bias and total_variation at equal numbers of faces: of the "
    "model that shows more faces of a prompt, their mean over all choices of as many as the other shows",
    "trained": "after minus start (the untrained adapter, where it changes images by itself), as paired: what training did",
    "paired.drift": "of an attribute without a target: the change of its bias and of each class's mean share as judged. "
    "Stayed: yes, every interval lies within the margin; no, that of the bias or one of ci95_all lies outside. Prompts "
    "that exchange their shares are not seen. ci95_these for stayed_within_these",
    "ci95_all": "as ci95, for all classes of the attribute at once (of more than two: .05 / classes each); ci95_all_these: "
    "for these prompts",
    "clip_t, clip_i, dino, between_seeds, named.kept": "means over prompts (subjects); ci95: Student's over prompts",
    "guidance": "bias.mean and target.total_variation at other guidance scales, with the same prompts and noise",
    "named.kept": "share of the faces that show the class which their prompt names; mean over subjects",
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
