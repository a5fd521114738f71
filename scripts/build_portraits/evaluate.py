"""Measure the shipped Portraits model and print every number of its model card as a table and as JSON.

    python scripts/build_portraits/evaluate.py --out numbers.json            # all parts, about an hour on two cores
    python scripts/build_portraits/evaluate.py --per-occupation 6 --test-pictures 20 --captions 4 --quality 200

Parts: judges, captions, phrases, shares, faces, quality, speed. Only judges and quality need renders. The effect of words
that name no attribute is measured by `python scripts/results.py words`.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import captions
import numpy as np
import torch
from data import Captioned, Renders, read
from stage import build_folder
from torch import Tensor

from classifiers.attributes import load_attribute_net
from classifiers.crop import EXPAND, crop
from classifiers.detect import MTCNNDetector
from fairdiff.bias import bias
from fairdiff.diffusion.load import DiffusionModel, load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.objective.features import ImageEncoder
from fairdiff.plan import different_first, shuffled
from fairdiff.portraits import distribution, occupations, weights
from fairdiff.prompts import Prompt, with_article

JUDGES = ("judge", "audit_judge")
BATCH = 32


@dataclass
class Bench:
    """The model, the networks that look at images, and the sampler's settings."""

    model: DiffusionModel
    judges: dict
    encoder: ImageEncoder
    detector: MTCNNDetector
    steps: int
    guidance: float
    seed: int

    def draw(self, prompt: str, count: int) -> Tensor:
        """Generate `count` images [n, 3, 64, 64] in [0, 1] of one prompt; image i is the same for every count."""
        generate = self.model.generator(self.guidance, self.steps)
        noise = initial_noise(prompt, self.seed, range(count), self.model.latent_shape)
        return torch.cat([generate(prompt, part) for part in noise.split(BATCH)])

    @torch.no_grad()
    def look(self, image_BCHW: Tensor) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
        """Return found [B], and per judge and attribute the class of each detected face [F]."""
        boxes = self.detector(image_BCHW)
        faces = crop(image_BCHW, boxes, 64, EXPAND)
        answers = {
            name: {key: logits.argmax(1).numpy() for key, logits in judge(faces).items()}
            for name, judge in self.judges.items()
        }
        return boxes.found_B.numpy(), answers


def open_bench(args: argparse.Namespace) -> Bench:
    judges = {name: load_attribute_net(weights(name)) for name in JUDGES}
    return Bench(
        load_model(args.model),
        judges,
        ImageEncoder(weights("encoder")),
        MTCNNDetector(input_size=64),
        args.steps,
        args.guidance,
        args.seed,
    )


def judges_on_renders(bench: Bench, renders: Renders, count: int) -> dict[str, float]:
    """Return the accuracy on held-out faces, per judge and attribute."""
    rows = renders.rows(1, people=True)[:count]
    found, answers = bench.look(renders.pictures(rows) / 2 + 0.5)
    truth = renders.labels(rows[found])
    return {"n": int(found.sum())} | {
        f"{name} {key}": float((answers[name][key] == truth[key]).mean()) for name in JUDGES for key in occupations.CLASSES
    }


def captions_obeyed(bench: Bench, count: int) -> tuple[dict[str, float], dict]:
    """Return the share of faces with the class that their caption names, by the audit judge, for all 16 cells."""
    right: dict[str, list] = {name: [] for name in occupations.CLASSES}
    agree: dict[str, list] = {name: [] for name in occupations.CLASSES}
    found_all = []
    for cell in product(range(2), range(4), range(2)):
        person = captions.Person(*cell)
        words = with_article(captions.describe_person(person, frozenset(occupations.CLASSES), "", 0))
        found, answers = bench.look(bench.draw(f"a photo of the face of {words}, a person", count))
        found_all.append(found)
        for place, name in enumerate(occupations.CLASSES):
            right[name].append(answers["audit_judge"][name] == cell[place])
            agree[name].append(answers["audit_judge"][name] == answers["judge"][name])
    obeyed = {name: float(np.concatenate(values).mean()) for name, values in right.items()}
    for place, race in enumerate(occupations.CLASSES["race"]):  # if it differs between groups, every share is skewed
        cells = [cell[1] == place for cell in product(range(2), range(4), range(2))]
        obeyed[f"face found, {race}"] = float(
            np.concatenate([f for f, c in zip(found_all, cells, strict=True) if c]).mean()
        )
    return obeyed | {"n": int(np.concatenate(found_all).sum())}, {"agree": agree, "found": found_all}


def shares_of_subjects(bench: Bench, few: int, many: int) -> tuple[dict[str, float], dict]:
    """Return the correlation with the training shares, and for test occupations bias and distance to the statistics."""
    test = {prompt.subject for prompt in one_title_each("test")}
    women, truth, distance, biases = [], [], [], {"gender": [], "race": [], "age": []}
    agree, found_all = {name: [] for name in occupations.CLASSES}, []
    for prompt in occupations.prompts("occupation", "all"):
        i = occupations.occupation_of(prompt.subject)
        found, answers = bench.look(bench.draw(prompt.text, many if prompt.subject in test else few))
        found_all.append(found)
        for name in occupations.CLASSES:
            agree[name].append(answers["audit_judge"][name] == answers["judge"][name])
        if not found.any():
            continue
        women.append(float((answers["audit_judge"]["gender"] == 0).mean()))
        truth.append(distribution.marginal_shares(i)["gender"][0])
        for name in biases if prompt.subject in test else ():
            classes = len(occupations.CLASSES[name])
            share = np.bincount(answers["audit_judge"][name], minlength=classes) / found.sum()
            biases[name].append(float(bias(share)))
        if prompt.subject in test:
            labour = distribution.labour_shares(i)
            cells = np.ravel_multi_index((answers["audit_judge"]["gender"], answers["audit_judge"]["race"]), (2, 4))
            share = np.bincount(cells, minlength=8) / found.sum()
            distance.append(0.5 * np.abs(share - np.outer(labour["gender"], labour["race"]).ravel()).sum())
    result = {"pearson r of women's share": float(np.corrcoef(women, truth)[0, 1]), "occupations": len(women)}
    result |= {
        f"mean {name} bias over {len(values)} test occupations": float(np.mean(values)) for name, values in biases.items()
    }
    result["median distance to labour, gender x race"] = float(np.median(distance))
    return result, {"agree": agree, "found": found_all}


def one_title_each(which: str) -> list[Prompt]:
    """Return one prompt for each occupation of a split, with the title that an audit uses first."""
    every = occupations.prompts("occupation", which)
    return different_first(shuffled(every))[: len({occupations.occupation_of(prompt.subject) for prompt in every})]


def phrases_obeyed(bench: Bench, count: int) -> dict[str, float]:
    """Return the share of faces with the class that a phrase beside the prompt names, over cells and occupations."""
    right: dict[str, list] = {name: [] for name in occupations.CLASSES}
    prompts = one_title_each("validation")
    for number, cell in enumerate(product(range(2), range(4), range(2))):
        for place, (name, value) in enumerate(zip(occupations.CLASSES, cell, strict=True)):
            prompt = prompts[(3 * number + place) % len(prompts)].text
            words = with_article(captions.describe_person(captions.Person(*cell), frozenset([name]), "", 0))
            _, answers = bench.look(bench.draw(f"{words}, {prompt}", count))
            right[name].append(answers["audit_judge"][name] == value)
    return {name: float(np.concatenate(values).mean()) for name, values in right.items()}


def faces_found(bench: Bench, people: list[np.ndarray], count: int) -> dict[str, float]:
    """Return MTCNN's detection rate on all people generated so far, and on prompts without people."""
    nobody = [bench.look(bench.draw(prompt.text, count))[0] for prompt in occupations.prompts("object", "all")]
    result = {"people": float(np.concatenate(people).mean()), "n people": sum(map(len, people))}
    return result | {"without people": float(np.concatenate(nobody).mean()), "n without": sum(map(len, nobody))}


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two fitted Gaussians (Heusel et al. 2017)."""
    cov_a, cov_b = np.cov(a_ND, rowvar=False), np.cov(b_ND, rowvar=False)
    values = np.linalg.eigvals(cov_a @ cov_b)
    root = np.sqrt(np.clip(values.real, 0, None)).sum()
    return float(((a_ND.mean(0) - b_ND.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def kernel_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the unbiased MMD^2 with kernel (x.y / D + 1)^3 (Binkowski et al. 2018); features have variance 1."""
    scale = b_ND.std()
    a_ND, b_ND = (a_ND - b_ND.mean(0)) / scale, (b_ND - b_ND.mean(0)) / scale
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a_ND, a_ND), (b_ND, b_ND), (a_ND, b_ND)))
    n, m = len(a_ND), len(b_ND)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


@torch.no_grad()
def quality(bench: Bench, renders: Renders, count: int) -> dict[str, float]:
    """Return FID and KID to held-out renders, by the embedded image encoder: generated, reconstructed, other renders."""
    rng = np.random.default_rng(bench.seed)
    pairs = [Captioned(renders, unnamed=0.0).draw(rng) for _ in range(count)]
    held_out = rng.choice(renders.rows(1), min(2 * count, len(renders.rows(1))), replace=False)
    truth = renders.pictures(held_out[::2]) / 2 + 0.5
    vae, again = bench.model.vae, []
    for part in (truth * 2 - 1).split(BATCH):
        again.append((vae.decode(vae.encode(part).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1))
    kinds = {
        "generated": torch.cat([bench.draw(caption, 1) for _, caption in pairs]),
        "vae reconstructions": torch.cat(again),
        "renders of the same captions": renders.pictures(np.array([row for row, _ in pairs])) / 2 + 0.5,
    }
    reference = renders.pictures(held_out[1::2]) / 2 + 0.5
    target = bench.encoder.image(reference).numpy().astype(float)
    result = {"n": count, "vae l1 (range 2)": float((torch.cat(again) - truth).abs().mean() * 2)}
    for name, image in kinds.items():
        features = np.concatenate([bench.encoder.image(part).numpy() for part in image.split(BATCH)]).astype(float)
        result |= {f"fid {name}": frechet(features, target), f"kid {name}": kernel_distance(features, target)}
    return result


def speed(bench: Bench, repeats: int = 5) -> dict[str, float]:
    """Return images per second of the fastest of some batches: sampling with decoding, and decoding alone."""
    generate = bench.model.generator(bench.guidance, bench.steps)
    prompt, best, decode = occupations.prompts("occupation", "test")[0].text, np.inf, np.inf
    noise = initial_noise(prompt, 0, range(BATCH), bench.model.latent_shape)
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            generate(prompt, noise)
            middle = time.perf_counter()
            bench.model.decode(noise)
            best, decode = min(best, middle - start), min(decode, time.perf_counter() - middle)
    return {
        "threads": torch.get_num_threads(),
        "steps": bench.steps,
        "guidance": bench.guidance,
        "pictures/s": BATCH / best,
        "decoded/s": BATCH / decode,
    }


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure the requested parts, and print each when it is done."""
    bench, report, people, agree = open_bench(args), {}, [], []
    has_renders = bool(list((build_folder() / "renders").glob("shard_*.npz")))
    renders = read(build_folder() / "renders") if has_renders else None

    def add(part: str, numbers: dict[str, float]) -> None:
        report[part] = numbers
        for key, value in numbers.items():
            print(f"{part:10s} {key:48s} {value:10.4f}", flush=True)

    if "judges" in args.parts and renders:
        add("judges", judges_on_renders(bench, renders, args.held_out))
    for part, run in (
        ("captions", lambda: captions_obeyed(bench, args.captions)),
        ("shares", lambda: shares_of_subjects(bench, args.per_occupation, args.test_pictures)),
    ):
        if part in args.parts:
            numbers, seen = run()
            add(part, numbers)
            people += seen["found"]
            agree.append(seen["agree"])
    if "phrases" in args.parts:
        add("phrases", phrases_obeyed(bench, args.captions))
    if agree:
        add(
            "agreement",
            {name: float(np.concatenate(sum((a[name] for a in agree), [])).mean()) for name in occupations.CLASSES},
        )
    if "faces" in args.parts and people:
        add("faces", faces_found(bench, people, args.objects))
    if "quality" in args.parts and renders:
        add("quality", quality(bench, renders, args.quality))
    if "speed" in args.parts:
        add("speed", speed(bench))
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ["judges", "captions", "phrases", "shares", "faces", "quality", "speed"]
    parser.add_argument("--parts", nargs="+", default=every, choices=every)
    parser.add_argument("--model", type=Path, default=weights("model"), help="a diffusers folder")
    parser.add_argument("--held-out", type=int, default=3000, help="renders for the judges")
    parser.add_argument("--captions", type=int, default=48, help="pictures of each of the 16 attribute captions")
    parser.add_argument("--per-occupation", type=int, default=24, help="pictures of train and validation occupations")
    parser.add_argument("--test-pictures", type=int, default=60, help="pictures of test occupations")
    parser.add_argument("--objects", type=int, default=16, help="pictures of each prompt without people")
    parser.add_argument("--quality", type=int, default=1500, help="pictures for FID and KID")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    report = evaluate(args)
    report["run"] = {"seconds": time.monotonic() - start, "seed": args.seed}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
