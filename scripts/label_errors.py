"""What wrong labels do to a judge, and what relaxing them does about it: explanation/label_errors.md.

python scripts/label_errors.py              all cells; the same command goes on
python scripts/label_errors.py --render     only write the page, of one's own records or else of the published ones
python scripts/label_errors.py --publish    docs/explanation/label_errors.md and its record, which goes on too

Renders of Portraits (scripts/build_portraits/make_data.py --images 4000) whose gender labels are flipped. Groups: race, Black
against the others. Noise: in all faces alike, or half as often again in the smaller group. The judge is a perceptron of one
hidden layer on 16 x 16 pixels without augmentation, small enough for hundreds of trainings and able to learn labels by heart.
The row of cleanlab needs ".[label_errors]". The page and measurements/label_errors.json go to outputs/reproduced.
"""

import argparse
import json
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from reproduce.place import ROOT, add_place, records_in
from scipy.stats import mannwhitneyu
from scipy.stats import t as student
from torch import nn

from classifiers.label_errors import Relaxation, chosen_weights, groups_of
from classifiers.training import label_loss, one_cycle
from fairdiff.cli.ending import ending
from fairdiff.files import write_json, write_text

RATES, KINDS, SEEDS = (0.1, 0.2, 0.3, 0.4), ("uniform", "by group"), (0, 1, 2)
METHODS = {
    "cross-entropy": "label smoothing .05, all labels believed",
    "relaxed": "Rockafellian relaxation, the share of wrong labels estimated in each group",
    "relaxed, one quantile": "the same with one estimate and one quantile for all",
    "cleanlab": "labels that `cleanlab.filter.find_label_issues` names in three-fold predictions are left out",
}
TRAIN, TEST, SIZE, HIDDEN, STEPS, BATCH, FOLDS = 1500, 1500, 16, 64, 400, 64, 3


@dataclass(frozen=True)
class Faces:
    """Pixels float [N, D] about 0, true gender [N], group [N]: 1 for the smaller one."""

    pixels: torch.Tensor
    gender_N: np.ndarray
    group_N: np.ndarray

    def rows(self, rows: np.ndarray) -> "Faces":
        return Faces(self.pixels[rows], self.gender_N[rows], self.group_N[rows])


def read_renders(folder: Path) -> Faces:
    """All rendered people, each pixel the mean of 4 x 4."""
    shards = [np.load(file) for file in sorted(folder.glob("shard_*.npz"))]
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in ("image", "gender", "race")}
    people = columns["gender"] >= 0
    images = columns["image"][people]
    by = images.shape[1] // SIZE
    small = images.reshape(len(images), SIZE, by, SIZE, by, 3).mean((2, 4)).reshape(len(images), -1)
    pixels = torch.from_numpy((small / 255 - 0.5) / 0.25).float()
    return Faces(pixels, columns["gender"][people].astype(np.int64), (columns["race"][people] == 1).astype(np.int64))


def flipped(faces: Faces, rate: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Labels [N] of which a share `rate` is wrong; by group: half as often again in the smaller one, below one half."""
    share = faces.group_N.mean()
    smaller = rate if kind == "uniform" else min(1.5 * rate, 0.48)
    larger = (rate - share * smaller) / (1 - share)
    wrong_N = rng.random(len(faces.gender_N)) < np.where(faces.group_N == 1, smaller, larger)
    return np.where(wrong_N, 1 - faces.gender_N, faces.gender_N)


def trained(pixels_ND: torch.Tensor, label_N: np.ndarray, seed: int, relax=None) -> nn.Module:
    """A judge of gender. relax: (how, group [N]) to choose the faces' weights in turns with the steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(pixels_ND.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    weight_N, true_N = torch.ones(len(label_N)), torch.from_numpy(label_N)
    for step in range(STEPS):
        if relax is not None and relax[0].due(step, STEPS):
            new_N = chosen_weights(probs(net, pixels_ND), label_N, relax[1], relax[0])
            weight_N.lerp_(torch.from_numpy(new_N).float() * len(label_N), relax[0].damping)
        rows = torch.randint(len(label_N), (BATCH,), generator=torch.Generator().manual_seed(seed * STEPS + step))
        loss = label_loss({"gender": net(pixels_ND[rows])}, {"gender": true_N[rows]}, 0.05, {"gender": weight_N[rows]})
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
    """Probabilities [N, K] of each face by a network that has not seen it."""
    fold_N = np.random.default_rng(seed).permutation(len(label_N)) % FOLDS
    found = np.zeros((len(label_N), 2))
    for fold in range(FOLDS):
        net = trained(pixels_ND[fold_N != fold], label_N[fold_N != fold], seed)
        found[fold_N == fold] = probs(net, pixels_ND[fold_N == fold])
    return found


def carry_out(method: str, train: Faces, label_N: np.ndarray, seed: int) -> tuple[nn.Module, np.ndarray]:
    """The judge, and of each training face how wrong its label looks [N]."""
    if method == "cleanlab":
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        out_NK = held_out_probs(train.pixels, label_N, seed)
        keep_N = ~find_label_issues(label_N, out_NK, n_jobs=1)
        return trained(train.pixels[keep_N], label_N[keep_N], seed), -get_label_quality_scores(label_N, out_NK)
    groups_N = groups_of({"gender": label_N, "group": train.group_N}, "gender")
    relax = {
        "cross-entropy": None,
        "relaxed": (Relaxation(), groups_N),
        "relaxed, one quantile": (Relaxation(by_group=False), groups_N),
    }
    net = trained(train.pixels, label_N, seed, relax[method])
    return net, -probs(net, train.pixels)[np.arange(len(label_N)), label_N]


def cell(faces: Faces, method: str, kind: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracy on true labels, error of the smaller group minus that of the larger, area under "is mislabelled"."""
    rng = np.random.default_rng([seed, int(100 * rate)])
    rows = rng.permutation(len(faces.gender_N))
    train, test = faces.rows(rows[:TRAIN]), faces.rows(rows[TRAIN : TRAIN + TEST])
    label_N = flipped(train, rate, kind, rng)
    net, suspicion_N = carry_out(method, train, label_N, seed)
    wrong_N = probs(net, test.pixels).argmax(1) != test.gender_N
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
    """Mean over seeds with its 95 % interval by Student's t."""
    if not values:
        return "not measured"
    form = "{:+.3f}" if signed else "{:.3f}"
    text = form.format(np.mean(values))
    if len(values) < 2:
        return text
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{text} ± {half:.3f}"


def table(record: dict, number: str) -> list[str]:
    lines = [f"| noise | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for kind, rate in product(KINDS, RATES):
        cells = [[record[k] for s in SEEDS if (k := key_of(m, kind, rate, s)) in record] for m in METHODS]
        found = [mean([c[number] for c in some], number == "gap") for some in cells]
        lines.append(f"| {100 * rate:.0f} %, {kind} | {' | '.join(found)} |")
    return lines


def differences(record: dict, number: str, one: str, other: str) -> str:
    """Of two methods on the same faces and labels, over all noises: mean over seeds with its interval."""
    by_seed = []
    for seed in SEEDS:
        pairs = [(key_of(one, k, r, seed), key_of(other, k, r, seed)) for k, r in product(KINDS, RATES)]
        if all(a in record and b in record for a, b in pairs):
            by_seed.append(float(np.mean([record[a][number] - record[b][number] for a, b in pairs])))
    return mean(by_seed, True)


def render(record: dict) -> str:
    text = (ROOT / "scripts" / "label_errors.md").read_text(encoding="utf-8")
    methods = [f"| {name} | {words} |" for name, words in METHODS.items()]
    parts = {"methods": "\n".join(["| row | training |", "|---|---|", *methods])}
    parts |= {number: "\n".join(table(record, number)) for number in ("accuracy", "gap", "area")}
    pairs = [(m, "cross-entropy") for m in METHODS if m != "cross-entropy"] + [("relaxed", "relaxed, one quantile")]
    rows = [f"| {a} − {b} | {differences(record, 'accuracy', a, b)} | {differences(record, 'gap', a, b)} |" for a, b in pairs]
    parts["differences"] = "\n".join(["| pair | accuracy | gap |", "|---|---|---|", *rows])
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path.home() / ".cache" / "fairdiff" / "build" / "renders"
    parser.add_argument("--renders", type=Path, default=default, help="folder of shards")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--render", action="store_true", help="measure nothing")
    add_place(parser)
    args = parser.parse_args(argv)
    kept = records_in(args.docs, "label_errors.json", seeded=args.render)
    page = args.docs / "explanation" / "label_errors.md"
    record = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if not args.render:
        torch.set_num_threads(1)
        if not list(args.renders.glob("shard_*.npz")):
            parser.error(f"--renders: {args.renders} holds no shards; scripts/build_portraits/make_data.py makes them")
        if "cleanlab" in args.methods and find_spec("cleanlab") is None:
            parser.error('--methods: cleanlab is not installed; pip install -e ".[label_errors]", or name the others')
        faces = read_renders(args.renders)
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
