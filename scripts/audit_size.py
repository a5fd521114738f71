"""How large an audit must be: images of each prompt so that a generator on target is found so in 80 of 100 audits.

python scripts/audit_size.py                                        two classes, margin .10
python scripts/audit_size.py --classes 8 --margin 0.15 --prompts 48
python scripts/audit_size.py --labels 2000 --accuracy 0.9           a judge whose errors were counted on 2000 faces

The target is uniform. Images are those with a face: where one in ten has none, ask for more.
"""

import argparse

import numpy as np

from fairdiff.audit.judge import judge_of
from fairdiff.audit.planner import images_needed
from fairdiff.audit.suite import ENOUGH


def sentence(prompts: int, images: int | None, known: bool) -> str:
    """What so many prompts take."""
    if images is None:
        why = "the judge's errors were counted on too few faces" if known else "the margin is too small"
        return f"{prompts} prompts: no number of images shows it, {why}."
    alone = "" if prompts >= ENOUGH else f" Of other prompts it says nothing: that takes {ENOUGH} prompts."
    return f"{prompts} prompts: {images} images with a face of each, {prompts * images} in all.{alone}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=2, choices=range(2, 17), metavar="K", help="2 to 16")
    parser.add_argument("--margin", type=float, default=0.10, help="of the distance D (audit.equivalence)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[12, 24, ENOUGH, 48, 100])
    parser.add_argument("--labels", type=int, help="labelled faces on which the judge's errors were counted")
    parser.add_argument("--accuracy", type=float, default=0.9, help="of the judge, alike for all classes")
    args = parser.parse_args(argv)
    K, judge = args.classes, None
    for key, value, most in (("margin", args.margin, 1), ("accuracy", args.accuracy, 1)):
        if not 0 < value <= most:
            parser.error(f"--{key}: found {value}, allowed: above 0, to {most}")
    if min(args.prompts) < 1 or (args.labels is not None and args.labels < K):
        parser.error(f"--prompts from 1, --labels from {K}")
    if args.labels is not None:
        wrong = (1 - args.accuracy) / (K - 1)
        judge = judge_of((np.full((K, K), wrong) + np.eye(K) * (args.accuracy - wrong)) * args.labels / K)
        if judge.refusal:
            parser.exit(2, f"error: {judge.refusal}\n")
    print(f"To show in 80 of 100 audits that D is below {args.margin:g} where the generator is on target, {K} classes:")
    for prompts in args.prompts:
        images = images_needed(prompts, np.full(K, 1 / K), args.margin, judge)
        print(sentence(prompts, images, judge is not None))


if __name__ == "__main__":
    main()
