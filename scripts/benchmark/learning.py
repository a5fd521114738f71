"""Compare gradients by training: validation bias over steps and over seconds, paired by seed.

All learners of a seed have the same batches and the same validation noise. They take turns of a few steps, so changes in the
machine's load affect all of them. Every turn ends with a checkpoint, so a repeated command continues.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from benchmark.config import BenchConfig
from benchmark.instruments import spread
from benchmark.literal import autograd_step, literal_step
from benchmark.world import make_trainee, synchronise
from fairdiff import builder, fingerprint
from fairdiff.plan import make_plan
from fairdiff.prompts import Prompt
from fairdiff.training import checkpoint
from fairdiff.training.step import training_step
from fairdiff.training.tracking import Metrics, read_metrics
from fairdiff.training.trainer import draw_batches, learning_rate
from fairdiff.training.update import Step, gather
from fairdiff.training.validation import Validation, validate


def name_of(learner: dict) -> str:
    """Return the name of a learner, such as `unit K=3` or `reference, literally`."""
    if learner["type"] == "literal":
        return "reference, literally"
    rest = {k: v for k, v in learner.items() if k != "type" and v is not None}
    short = [f"K={rest.pop('evaluations')}"] if "evaluations" in rest else []
    return " ".join([learner["type"], *short, *(f"{k}={v}" for k, v in rest.items())])


def step_of(learner: dict, literal_batch: int) -> Step | None:
    """Return the step function of a learner, None for the usual training step with this `gradient`."""
    match learner["type"]:
        case "literal":
            return partial(literal_step, micro_batch=literal_batch)
        case "autograd":
            return autograd_step
        case "truncated":
            return partial(autograd_step, last=learner["last"])
    return None


def hold_out(prompts: list[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the training prompts, and the last `count` different prompts, which are held out."""
    held = dict(list({p.text: p for p in reversed(prompts)}.items())[:count])
    return [p for p in prompts if p.text not in held], list(held.values())[::-1]


class Learner:
    """The run of one gradient with one seed: it trains, validates, and saves both on disk."""

    def __init__(self, config: BenchConfig, learner: dict, folder: Path):
        config = replace(config, cache=str(folder / "originals"))  # a resumed run does not generate them again
        own, plan, watch = step_of(learner, config.literal_batch), make_plan(config), config.watch
        self.make_step = own or training_step
        self.trainee = make_trainee(config, None if own else learner)
        self.config, self.folder = config, folder
        self.schedule = builder.build_schedule(config, plan)
        self.prompts, held_out = hold_out(list(plan.train), watch.prompts)
        self.validation = Validation(watch.every, held_out, watch.images, config.sampler.audit_steps, -1.0, None)
        self.parameters = self.trainee.adapter.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.schedule.learning_rate, weight_decay=self.schedule.weight_decay
        )
        self.ema = checkpoint.Ema(self.parameters, self.schedule.ema)
        self.parts = {"ema": self.ema, "optimizer": self.optimizer}
        self.parts |= {"balance": self.trainee.balance} if self.trainee.balance else {}
        self.key = fingerprint.of_values(learner, config.seed)
        self.step = checkpoint.load(folder, self.key, self.parts, print)
        self.metrics = Metrics(folder / "metrics.jsonl", self.step + 1)  # row n: after n steps
        self.looked = {row["step"] for row in read_metrics(folder / "metrics.jsonl")}

    def advance(self, until: int) -> None:
        """Train up to a step, validate, and save a checkpoint."""
        if until in self.looked:
            return
        seconds, norms = 0.0, []
        while self.step < until:
            batches = draw_batches(self.prompts, self.schedule, self.step)
            began = time.perf_counter()
            update = gather(self.trainee, batches, self.make_step)
            if update.good:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.schedule, self.step)
                self.optimizer.step()
                self.ema.update(self.step)
                norms.append(update.norm)
            synchronise(self.config.device)
            seconds += time.perf_counter() - began
            self.step += 1
        row = {"step": self.step, "seconds": seconds, "bias": self.look(), "norm": sum(norms) / max(len(norms), 1)}
        self.metrics.write(row)
        checkpoint.save(self.folder, self.step, self.key, self.parts)

    def look(self) -> float:
        """Return the bias of the averaged adapter on the held-out prompts, by `validate`, mean over attributes."""
        with self.ema.in_place():
            row = validate(self.trainee, self.validation, self.schedule.seed)
        return fmean(value for name, value in row.items() if name.startswith("validation.bias."))

    def history(self) -> list[dict]:
        """Return [{step, seconds so far, bias}], one entry per validation."""
        total, rows = 0.0, []
        for row in read_metrics(self.folder / "metrics.jsonl"):
            total += row["seconds"]
            rows.append({"step": row["step"], "seconds": total, "bias": row["bias"]})
        return rows


def first_below(history: list[dict], threshold: float, what: str) -> float | None:
    """Return the first step or second with a bias at or below a threshold, interpolated linearly; None if there is none."""
    for before, after in zip(history[:1] + history, history, strict=False):
        if after["bias"] <= threshold:
            if before["bias"] <= threshold:
                return float(after[what])
            part = (before["bias"] - threshold) / (before["bias"] - after["bias"])
            return before[what] + part * (after[what] - before[what])
    return None


def measure_learning(part: str, config: BenchConfig, folder: Path, keep: Callable[[dict, bool], None]) -> None:
    """Run all learners of a part for every seed; `keep` is called with the results so far after every turn."""
    wanted = {"time_to_bias": config.time_to_bias, "ablation": config.ablation}[part]
    runs: dict[str, dict[str, list[dict]]] = {name_of(w): {} for w in wanted}
    every = config.watch.every
    turns = [*range(0, config.steps, every), config.steps]
    for seed in config.seeds:
        seeded = replace(config, seed=seed)
        learners = {name_of(w): Learner(seeded, w, folder / name_of(w) / f"seed{seed}") for w in wanted}
        for until in turns:
            for name, learner in learners.items():
                learner.advance(until)
                runs[name][str(seed)] = learner.history()
            keep(summary(runs, config), seed == config.seeds[-1] and until == config.steps)


def summary(runs: dict[str, dict[str, list[dict]]], config: BenchConfig) -> dict:
    """Return the histories, and for each threshold the steps and seconds to it with paired ratios to the first learner."""
    rows = []
    baseline = next(iter(runs.values()))
    for threshold in config.thresholds:
        for name, seeds in runs.items():
            row: dict = {"learner": name, "threshold": threshold, "reached": 0, "seeds": len(seeds)}
            for what in ("step", "seconds"):
                own = {seed: first_below(h, threshold, what) for seed, h in seeds.items()}
                own = {seed: v for seed, v in own.items() if v is not None}
                theirs = {s: first_below(baseline[s], threshold, what) for s in own if s in baseline}
                ratios = [theirs[s] / own[s] for s in own if theirs.get(s) is not None and own[s] > 0]
                row |= {"reached": len(own), what: spread(list(own.values())) if own else None}
                row |= {f"{what}_ratio": spread(ratios) if ratios else None}
            rows.append(row)
    return {"runs": runs, "rows": rows, "steps": config.steps, "watch": vars(config.watch)}
