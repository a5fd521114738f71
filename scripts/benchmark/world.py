"""Build the model, the perception and the trainees of a measurement, and describe its settings and its machine."""

import gc
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch

from benchmark import random_sd
from benchmark.config import BenchConfig
from benchmark.literal import literal_step
from fairdiff import builder
from fairdiff.config import GradientConfig
from fairdiff.diffusion.load import DiffusionModel, check_device
from fairdiff.diffusion.memory import Pieces
from fairdiff.errors import FairDiffError
from fairdiff.objective.perception import Perception
from fairdiff.plan import Plan, make_plan
from fairdiff.training.step import Batch, StepResult, Trainee, training_step


@dataclass(frozen=True)
class Variant:
    """One way to compute a step.

    evaluations: K of T, None for all. cold: generate the reference images again. literal: use the reference algorithm.
    """

    name: str
    evaluations: int | None = None
    cold: bool = False
    literal: bool = False


def make_world(config: BenchConfig, plan: Plan) -> tuple[DiffusionModel, Perception]:
    """Return the model and the perception of a configuration, with real or random weights."""
    if config.random is None:
        model, perception = builder.build_model(config), builder.build_perception(config, plan)
    else:
        check_device(config.device)
        dtype, sampling_dtype = builder.precisions(config)
        model = random_sd.make_model(config.random, dtype, config.device)
        perception = random_sd.make_perception(config.random, plan.attributes, dtype, config.device)
        model.sampling_dtype = sampling_dtype
    if config.channels_last:
        for module in (model.unet, model.vae):
            module.to(memory_format=torch.channels_last)
    return model, perception


def weights_fingerprint(config: BenchConfig) -> str:
    """Return a hash of the frozen weights, "random" for random ones, which follow from the configuration."""
    if config.random is not None:
        return "random"
    return builder.originals_fingerprint(config, *make_world(config, make_plan(config)))


def finish(config: BenchConfig) -> BenchConfig:
    """Set the sampler of a model with random weights to the one in `config.random`."""
    if config.random is None:
        return config
    steps, guidance = config.random.steps, config.random.guidance
    return replace(config, sampler=replace(config.sampler, guidance=guidance, train_steps=[steps, steps]))


def make_trainee(config: BenchConfig, gradient: dict | None = None) -> Trainee:
    """Return a trainee with a new model. gradient: keys of the group `gradient` instead of the configuration's."""
    if gradient is not None:
        config = replace(config, gradient=GradientConfig(**gradient))
    plan = make_plan(config)
    trainee = builder.build_trainee(config, plan, *make_world(config, plan))
    if config.compile:
        trainee.model.unet.compile()
    return trainee


def sampler_steps(config: BenchConfig) -> int:
    """Return T, the middle of the range of `sampler.train_steps`."""
    return sum(config.sampler.train_steps) // 2


def fractions(steps: int) -> list[int]:
    """Return K = T, T/2, T/3 and T/6, rounded, without duplicates."""
    return list(dict.fromkeys(max(1, round(steps / n)) for n in (1, 2, 3, 6)))


def draw(config: BenchConfig, number: int, size: int | None = None, steps: int | None = None) -> Batch:
    """Return batch `number`: one prompt with images 0..size-1 of its noise pool."""
    prompts = make_plan(config).train
    generator = torch.Generator().manual_seed(config.seed + number)
    indices = list(range(size or config.global_batch))
    steps = steps or sampler_steps(config)
    return Batch(prompts[number % len(prompts)].text, indices, steps, config.seed, generator)


def run_variant(trainee: Trainee, batch: Batch, variant: Variant, literal_batch: int) -> StepResult:
    """Accumulate the gradient of one batch by a variant. FairDiffError if no face has a confident label."""
    if variant.literal:
        result = literal_step(trainee, batch, literal_batch)
    else:
        method = replace(trainee.method, gradient="unit", evaluations=variant.evaluations)
        if variant.cold:
            trainee.originals.rows.clear()
        result = training_step(replace(trainee, method=method), batch)
    if not result.kept:  # such a step would only sample; two faces with targets of one half have no confident label
        raise FairDiffError(
            f"global_batch: found {len(batch.indices)} pictures of which no face has a label, so that nothing is "
            "measured; allowed: more of them"
        )
    return result


def warm_up(trainee: Trainee, batch: Batch) -> None:
    """Generate the reference images of a batch, so a step finds them in the cache."""
    trainee.originals.get(batch.prompt, batch.indices, batch.steps)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def conditions(config: BenchConfig) -> dict:
    """Return the date, the machine and the versions of libraries, on which the page's numbers depend besides the code."""
    found = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = found[0] if found else platform.processor()
    device = cpu if config.device == "cpu" else torch.cuda.get_device_name()
    return {
        "date": time.strftime("%F"),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def describe(config: BenchConfig) -> dict:
    """Return the settings of a measurement as shown on the page."""
    model = "random weights, SD 1.5's shapes" if config.random else config.model.path or "Portraits"
    if config.random:
        side = 8 * config.random.latent
        model += f" ({side}×{side} pixels, U-Net {'-'.join(map(str, config.random.unet))})"
    adapter = config.adapter
    kind = (
        adapter.type if adapter.type == "soft_tokens" else f"LoRA rank {adapter.rank} on {' and '.join(adapter.parts)}"
    )
    dtype, sampling_dtype = (str(found).removeprefix("torch.") for found in builder.precisions(config))
    if sampling_dtype != dtype:
        dtype += f", sampled in {sampling_dtype}"
    return {
        "model": model,
        "adapter": kind,
        "B": config.global_batch,
        "T": sampler_steps(config),
        "guidance": config.sampler.guidance,
        "dtype": dtype,
        "replay_batch": Pieces.of(config.micro_batch).replay,
        "decode_batch": config.micro_batch,
        "literal_batch": config.literal_batch,
        "originals": config.loss.originals,
        "channels_last": config.channels_last,
        "compile": config.compile,
    }
