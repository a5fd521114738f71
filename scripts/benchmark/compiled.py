"""Benchmark torch.compile and channels_last: seconds of the frozen networks' forward passes, in turns with today's code."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from warnings import catch_warnings, filterwarnings

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from benchmark.config import BenchConfig
from benchmark.instruments import spread
from benchmark.world import make_world, synchronise
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan

EAGER = "as it runs today"
VARIANTS = {  # (channels_last, compiled)
    EAGER: (False, False),
    "channels_last": (True, False),
    "torch.compile": (False, True),
    "both": (True, True),
}
MOST_SHAPES = 64  # compiled shapes per class of block; beyond torch's default 8 a block would silently run uncompiled


def measure_compile(config: BenchConfig, backend: str = "inductor") -> dict:
    """Let every variant in turn sample and decode the same `global_batch` images; the first round, which compiles, is
    reported separately."""
    if backend == "inductor":
        require_compiler(config.device)
    plan = make_plan(config)
    model, _ = make_world(replace(config, channels_last=False), plan)
    size, steps = config.global_batch, config.sampler.audit_steps
    model.sample_batch = size
    noise = initial_noise(plan.train[0].text, config.seed, range(size), model.latent_shape).to(config.device)
    with torch.no_grad():
        guidance = Guidance(*model.encode_pair(plan.train[0].text), config.sampler.guidance)
        latent = model.sample(guidance, noise, steps).final
    forwards = {
        "sampling": lambda own: own.sample(guidance, noise, steps).final,
        "decoding": lambda own: own.decode(latent),
    }
    models = {name: variant(model, *options, backend) for name, options in VARIANTS.items()}
    places = [(forward, name) for forward in forwards for name in models]
    seconds: dict[tuple[str, str], list[float]] = {place: [] for place in places}
    apart = dict.fromkeys(places, 0.0)
    with torch.no_grad(), compiling_anew():
        for _ in range(1 + config.warmup + config.repeats):
            for forward, run in forwards.items():
                made = {name: timed(run, own, config.device, seconds[forward, name]) for name, own in models.items()}
                found = {(forward, name): (made[name] - made[EAGER]).abs().max().item() for name in models}
                apart |= {place: max(apart[place], value) for place, value in found.items()}
    kept = {place: own[1 + config.warmup :] for place, own in seconds.items()}
    rows = [
        {
            "forward": forward,
            "variant": name,
            "seconds": spread(kept[forward, name]),
            "faster": spread([a / b for a, b in zip(kept[forward, EAGER], kept[forward, name], strict=True)]),
            "compilation": seconds[forward, name][0] - spread(kept[forward, name])[0] if VARIANTS[name][1] else None,
            "apart": apart[forward, name],
        }
        for forward, name in places
    ]
    return {"rows": rows, "T": steps, "rounds": config.repeats}


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Compile every block for every shape inside, without the caches of this process and of the disk."""
    options = {"recompile_limit": MOST_SHAPES, "accumulated_recompile_limit": MOST_SHAPES * len(VARIANTS)}
    with torch._dynamo.config.patch(**options), torch.compiler.config.patch(force_disable_caches=True), catch_warnings():
        filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)  # intended
        torch.compiler.reset()
        yield
        torch.compiler.reset()


def timed(run, model: DiffusionModel, device: str, seconds: list[float]) -> Tensor:
    """Return the result of a forward pass, and append its seconds to `seconds`."""
    synchronise(device)
    began = time.perf_counter()
    made = run(model)
    synchronise(device)
    seconds.append(time.perf_counter() - began)
    return made


def require_compiler(device: str) -> None:
    """Raise FairDiffError if torch.compile needs a C++ compiler (on a CPU) and there is none."""
    name = os.environ.get("CXX", "g++")  # as in torch
    if device == "cpu" and shutil.which(name) is None:
        raise FairDiffError(
            f"part: found compile, but this machine has no C++ compiler {name}, which torch.compile needs on a processor; "
            "allowed: install it, or name another in CXX"
        )


def variant(model: DiffusionModel, channels_last: bool, compiled: bool, backend: str) -> DiffusionModel:
    """Return the model with copies of its U-Net and VAE, in channels_last or compiled if requested."""
    unet, vae = deepcopy(model.unet), deepcopy(model.vae)
    for module in (unet, vae):
        if channels_last:
            module.to(memory_format=torch.channels_last)
        if compiled:
            compile_blocks(module, backend)
    return replace(model, unet=unet, vae=vae)


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Compile the blocks that diffusers lists as repeated. For a VAE it lists none, so the residual blocks are compiled.

    Each block is compiled as one graph for its own shape; otherwise torch raises an error.
    """
    options = {"backend": backend, "fullgraph": True, "dynamic": False}
    if module._repeated_blocks:
        module.compile_repeated_blocks(**options)
        return
    for block in module.modules():
        if isinstance(block, ResnetBlock2D):
            block.compile(**options)
