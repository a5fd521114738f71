"""Measure the effect of wrong labels on an attribute classifier, and the effect of remedies: explanation/label_errors.md.

python scripts/label_errors.py              all cells; repeat it to continue
python scripts/label_errors.py --render     write only the page, from your records or else from the published ones
python scripts/label_errors.py --publish    continue and write docs/explanation/label_errors.md and its record instead

The data are renders of Portraits (scripts/build_portraits/make_data.py --images 4000) with flipped gender labels. The groups
are Black and all other races. The noise is uniform, or half as frequent again in the smaller group. The classifier is a
perceptron with one hidden layer on 16 x 16 pixels without augmentation. It is small enough for hundreds of trainings, and
it can memorise labels. The row cleanlab needs ".[label_errors]". The page and measurements/label_errors.json are written to
outputs/reproduced.
"""

import argparse
import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness.labelled_renders import FOLDER, KINDS, Faces, flipped, half_width, has_renders, read_renders, renders_hash
from reproduce.place import ROOT, add_place, records_in
from scipy.stats import mannwhitneyu
from torch import nn

from classifiers.label_errors import Relaxation, chosen_weights, groups_of
from classifiers.training import attacked, label_loss, one_cycle
from fairdiff.cli.ending import ending
from fairdiff.files import write_json, write_text

RATES, SEEDS = (0.1, 0.2, 0.3, 0.4), (0, 1, 2)
METHODS = {
    "cross-entropy": "label smoothing .05, all labels are used",
    "relaxed": "Rockafellian relaxation, with the share of wrong labels estimated in each group",
    "relaxed, one quantile": "the same with one estimate and one quantile for all groups",
    "relaxed, mass to the best": "relaxed, and the best face of each group gets the weight of the dropped ones",
    "relaxed, adversarial": "relaxed, and each step moves pixels by .01 of their range to increase the loss",
    "cleanlab": "labels flagged by `cleanlab.filter.find_label_issues` in three-fold predictions are left out",
}
TRAIN, TEST, SIZE, HIDDEN, STEPS, BATCH, FOLDS = 1500, 1500, 16, 64, 400, 64, 3
MEANS = ("accuracy", "gap")  # the numbers whose differences are tabulated
SPREAD, EPSILON = 0.25, 0.01  # assumed standard deviation and attack size, for pixels in [0, 1]


def pixels_of(faces: Faces) -> torch.Tensor:
    """Return images reduced to SIZE x SIZE by averaging and normalised, as floats [N, D] around 0."""
    by = faces.images.shape[1] // SIZE
    small = faces.images.reshape(len(faces.images), SIZE, by, SIZE, by, 3).mean((2, 4)).reshape(len(faces.images), -1)
    return torch.from_numpy((small / 255 - 0.5) / SPREAD).float()


def trained(pixels_ND: torch.Tensor, label_N: np.ndarray, seed: int, relax=None) -> nn.Module:
    """Train a gender classifier. relax: (settings, group [N]) to choose the faces' weights between the steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(pixels_ND.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    weight_N, true_N = torch.ones(len(label_N)), torch.from_numpy(label_N)
    for step in range(STEPS):
        if relax is not None and relax[0].due(step, STEPS):
            new_N = chosen_weights(probs(net, pixels_ND), label_N, relax[1], relax[0])
            weight_N.lerp_(torch.from_numpy(new_N).float() * len(label_N), relax[0].damping)
        rows = torch.randint(len(label_N), (BATCH,), generator=torch.Generator().manual_seed(seed * STEPS + step))
        about = ({"gender": true_N[rows]}, 0.05, {"gender": weight_N[rows]})
        batch_BD = pixels_ND[rows]
        if relax is not None and relax[0].epsilon > 0:
            moved_by = relax[0].epsilon / SPREAD
            batch_BD = attacked(net, batch_BD, moved_by, lambda logits, about=about: label_loss({"gender": logits}, *about))
        loss = label_loss({"gender": net(batch_BD)}, *about)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * one_cycle(step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def probs(net: nn.Module, pixels_ND: torch.Tensor) -> np.ndarray:
    return net(pixels_ND).softmax(1).numpy()


def held_out_probs(pixels_ND: torch.Tensor, label_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the class probabilities [N, K] of each face from a network that was not trained on it."""
    fold_N = np.random.default_rng(seed).permutation(len(label_N)) % FOLDS
    found = np.zeros((len(label_N), 2))
    for fold in range(FOLDS):
        net = trained(pixels_ND[fold_N != fold], label_N[fold_N != fold], seed)
        found[fold_N == fold] = probs(net, pixels_ND[fold_N == fold])
    return found


def carry_out(method: str, train: Faces, label_N: np.ndarray, seed: int) -> tuple[nn.Module, np.ndarray]:
    """Train a classifier by a method, and return it with a score [N] of how suspect each training label is."""
    pixels_ND = pixels_of(train)
    if method == "cleanlab":
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        out_NK = held_out_probs(pixels_ND, label_N, seed)
        keep_N = ~find_label_issues(label_N, out_NK, n_jobs=1)
        return trained(pixels_ND[keep_N], label_N[keep_N], seed), -get_label_quality_scores(label_N, out_NK)
    groups_N = groups_of({"gender": label_N, "group": train.group_N}, "gender")
    relax = {
        "cross-entropy": None,
        "relaxed": (Relaxation(), groups_N),
        "relaxed, one quantile": (Relaxation(by_group=False), groups_N),
        "relaxed, mass to the best": (Relaxation(to_best=True), groups_N),
        "relaxed, adversarial": (Relaxation(epsilon=EPSILON), groups_N),
    }
    net = trained(pixels_ND, label_N, seed, relax[method])
    return net, -probs(net, pixels_ND)[np.arange(len(label_N)), label_N]


def cell(faces: Faces, method: str, kind: str, rate: float, seed: int) -> dict[str, float]:
    """Return accuracy on true labels, error of the smaller group minus that of the larger, and AUC of "is mislabelled"."""
    rng = np.random.default_rng([seed, int(100 * rate)])
    rows = rng.permutation(len(faces.gender_N))
    train, test = faces.rows(rows[:TRAIN]), faces.rows(rows[TRAIN : TRAIN + TEST])
    label_N = flipped(train, rate, kind, rng)
    net, suspicion_N = carry_out(method, train, label_N, seed)
    wrong_N = probs(net, pixels_of(test)).argmax(1) != test.gender_N
    mislabelled_N = label_N != train.gender_N
    area = mannwhitneyu(suspicion_N[mislabelled_N], suspicion_N[~mislabelled_N]).statistic
    return {
        "accuracy": 1 - float(wrong_N.mean()),
        "gap": float(wrong_N[test.group_N == 1].mean() - wrong_N[test.group_N == 0].mean()),
        "area": float(area / (mislabelled_N.sum() * (~mislabelled_N).sum())),
    }


def key_of(method: str, kind: str, rate: float, seed: int) -> str:
    return f"{method}/{kind}/{rate}/{seed}"


def mean(values: list[float], signed: bool = False) -> str:
    """Return as text the mean over seeds with its 95 % interval by Student's t."""
    if not values:
        return "not measured"
    form = "{:+.3f}" if signed else "{:.3f}"
    text = form.format(np.mean(values))
    return text if len(values) < 2 else f"{text} ± {half_width(values):.3f}"


def measured(record: dict) -> list[str]:
    """Return the methods that have a measured cell."""
    return [m for m in METHODS if any(key_of(m, k, r, s) in record for s, k, r in product(SEEDS, KINDS, RATES))]


def table(record: dict, number: str) -> list[str]:
    names = measured(record)
    lines = [f"| noise | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind, rate in product(KINDS, RATES):
        cells = [[record[k] for s in SEEDS if (k := key_of(m, kind, rate, s)) in record] for m in names]
        found = [mean([c[number] for c in some], number == "gap") for some in cells]
        lines.append(f"| {100 * rate:.0f} %, {kind} | {' | '.join(found)} |")
    return lines


def differences(record: dict, number: str, one: str, other: str, rates: tuple[float, ...] = RATES) -> str:
    """Return as text the mean difference of two methods over seeds, with its interval.

    Both have the same faces and labels. The difference for a seed is the mean over all kinds of noise and these rates."""
    by_seed = []
    for seed in SEEDS:
        pairs = [(key_of(one, k, r, seed), key_of(other, k, r, seed)) for k, r in product(KINDS, rates)]
        if pairs and all(a in record and b in record for a, b in pairs):
            by_seed.append(float(np.mean([record[a][number] - record[b][number] for a, b in pairs])))
    return mean(by_seed, True)


def render(record: dict) -> str:
    text = (ROOT / "scripts" / "label_errors.md").read_text(encoding="utf-8")
    known = measured(record)
    methods = [f"| {name} | {words}{'' if name in known else '; not measured yet'} |" for name, words in METHODS.items()]
    parts = {"methods": "\n".join(["| row | training |", "|---|---|", *methods])}
    parts |= {number: "\n".join(table(record, number)) for number in ("accuracy", "gap", "area")}
    pairs = [(m, "cross-entropy") for m in measured(record) if m != "cross-entropy"] + [("relaxed", "relaxed, one quantile")]
    cells = [[differences(record, what, a, b, some) for some in (RATES, RATES[:-1]) for what in MEANS] for a, b in pairs]
    rows = [f"| {a} − {b} | {' | '.join(own)} |" for (a, b), own in zip(pairs, cells, strict=True)]
    head = ["pair", *MEANS, *(f"{what}, without {RATES[-1]:.0%}".replace("%", " %") for what in MEANS)]
    parts["differences"] = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renders", type=Path, default=FOLDER, help="folder of shards")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--render", action="store_true", help="measure nothing")
    add_place(parser)
    args = parser.parse_args(argv)
    kept = records_in(args.docs, "label_errors.json", seeded=args.render)
    page = args.docs / "explanation" / "label_errors.md"
    record = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if not args.render:
        torch.set_num_threads(1)
        if not has_renders(args.renders):
            parser.error(f"--renders: {args.renders} holds no shards; scripts/build_portraits/make_data.py makes them")
        if "cleanlab" in args.methods and find_spec("cleanlab") is None:
            parser.error('--methods: cleanlab is not installed; pip install -e ".[label_errors]", or name the others')
        made_of = renders_hash(args.renders)
        if record and record.get("renders") != made_of:
            parser.error(f"--renders: {args.renders} holds other faces than {kept} is of, allowed: the same, or no such file")
        faces, record["renders"] = read_renders(args.renders), made_of
        for seed, kind, rate, method in product(SEEDS, KINDS, RATES, args.methods):
            key = key_of(method, kind, rate, seed)
            if key not in record:
                record[key] = cell(faces, method, kind, rate, seed)
                write_json(kept, record)
                print(key, {name: round(value, 3) for name, value in record[key].items()}, flush=True)
    write_text(page, render(record))
    print(f"page: {page}")


if __name__ == "__main__":
    main()
