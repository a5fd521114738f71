"""Benchmark one step: evaluations, seconds and memory of the reference algorithm and of ours; FLOP/s on a GPU."""

import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark.config import BenchConfig
from benchmark.instruments import counted, peak_memory, spread, staged
from benchmark.world import (
    Variant,
    draw,
    forget,
    fractions,
    make_trainee,
    run_variant,
    sampler_steps,
    synchronise,
    warm_up,
)
from fairdiff.diffusion.denoise import call_unet
from fairdiff.training.step import Batch, Trainee, embed_prompt
from fairdiff.training.update import Step, gather

LITERAL = Variant("reference, literally", literal=True)


def variants(config: BenchConfig) -> list[Variant]:
    """Return the reference, then ours with decreasing K, each with cached and with newly generated reference images."""
    steps = sampler_steps(config)
    ours = [
        Variant(f"ours, K = {k}" + (", cold" if cold else ""), k, cold)
        for k in fractions(steps)
        for cold in (False, True)
    ]
    return [LITERAL, *ours]


def whole_step(trainee: Trainee, optimizer: torch.optim.Optimizer, batch: Batch, step: Step) -> float:
    """Return the seconds of an update by one batch. The learning rate is 0, so every variant has the same adapter."""
    device = str(trainee.model.unet.device)
    synchronise(device)
    began = time.perf_counter()
    gather(trainee, [batch], step)
    optimizer.step()
    synchronise(device)
    return time.perf_counter() - began


def measure_steps(config: BenchConfig) -> dict:
    """Run every variant on the same batches, interleaved; return counts, seconds and ratios to the reference by round."""
    trainee = make_trainee(config)
    optimizer = torch.optim.AdamW(trainee.adapter.parameters(), 0.0)
    contestants = variants(config)
    seconds: dict[str, list[float]] = {v.name: [] for v in contestants}
    counts: dict[str, Counter] = {}
    for number in range(config.warmup + config.repeats):
        for variant in contestants:
            batch = draw(config, number)
            warm_up(trainee, batch)
            with counted(trainee.model.unet) as found:
                step = partial(run_variant, variant=variant, literal_batch=config.literal_batch)
                took = whole_step(trainee, optimizer, batch, step)
            counts[variant.name] = found
            if number >= config.warmup:
                seconds[variant.name].append(took)
    memory = {v.name: memory_apart(config, v, draw(config, 0)) for v in contestants}
    rows = []
    for variant in contestants:
        own, reference = seconds[variant.name], seconds[LITERAL.name]
        rows.append(
            {
                "variant": variant.name,
                "evaluations": dict(counts[variant.name]),
                "total": counts[variant.name].total(),
                "fewer": counts[LITERAL.name].total() / counts[variant.name].total(),
                "seconds": spread(own),
                "faster": spread([a / b for a, b in zip(reference, own, strict=True)]),
                "peak_mib": memory[variant.name],
            }
        )
    ratio = backward_per_forward(trainee, draw(config, 0))
    return {"rows": rows, "rounds": config.repeats, "backward_per_forward": ratio}


def memory_of(config: BenchConfig, variant: Variant, batch_size: int, steps: int) -> float:
    """Return the MiB of one step in this process."""
    trainee = make_trainee(config)
    batch = draw(config, 0, batch_size, steps)
    if not variant.literal and not variant.cold:
        warm_up(trainee, batch)
    forget()
    return peak_memory(config.device, lambda: run_variant(trainee, batch, variant, config.literal_batch))


def one_thread() -> None:
    """Use one thread, because the memory arenas of more threads would be counted as the step's."""
    torch.set_num_threads(1)


def memory_apart(config: BenchConfig, variant: Variant, batch: Batch) -> float:
    """Return `memory_of`; on a CPU from a new process, because it can only be read as a process's high-water mark."""
    arguments = (config, variant, len(batch.indices), batch.steps)
    if config.device != "cpu":
        return memory_of(*arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fairdiff.builder"])  # imported once for all processes
    with ProcessPoolExecutor(1, context, one_thread) as pool:
        return pool.submit(memory_of, *arguments).result()


def measure_memory(config: BenchConfig) -> dict:
    """Return the peak memory over T at the configured B, and over B at the configured T."""
    steps = sampler_steps(config)
    rows = []
    for over, values in (("T", config.lengths), ("B", config.sizes)):
        for value in values:
            length, size = (value, config.global_batch) if over == "T" else (steps, value)
            sized = replace(config, global_batch=size, noise_pool=max(size, config.noise_pool))
            few = Variant("ours", max(1, round(length / 3)))
            found = {
                "literal": memory_apart(sized, LITERAL, draw(sized, 0, size, length)),
                "ours": memory_apart(sized, few, draw(sized, 0, size, length)),
            }
            rows.append({"over": over, "T": length, "B": size, "K": few.evaluations, "peak_mib": found})
    return {"rows": rows}


def measure_profile(config: BenchConfig) -> dict:
    """Return the seconds of a step with cached reference images by stage, at the configured K; medians over the repeats."""
    trainee = make_trainee(config)
    optimizer = torch.optim.AdamW(trainee.adapter.parameters(), 0.0)
    variant = Variant("ours", config.gradient.evaluations)
    found: list[Counter] = []
    for number in range(config.warmup + config.repeats):
        batch = draw(config, number)
        warm_up(trainee, batch)
        with staged(trainee, lambda: synchronise(config.device)) as watch, watch.stage("rest"):
            gather(trainee, [batch], partial(run_variant, variant=variant, literal_batch=config.literal_batch))
            with watch.stage("optimiser"):
                optimizer.step()
        if number >= config.warmup:
            found.append(watch.seconds)
    names = sorted({name for watch in found for name in watch})
    rows = [{"stage": name, "seconds": spread([watch[name] for watch in found])} for name in names]
    rows.sort(key=lambda row: -row["seconds"][0])
    total = spread([watch.total() for watch in found])
    return {"rows": rows, "seconds": total, "K": variant.evaluations or sampler_steps(config)}


def flops_of(run) -> float:
    """Return the floating-point operations of one call: matrix products, convolutions, attention, and their backward."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def backward_per_forward(trainee: Trainee, batch: Batch) -> float:
    """Return the operations of one U-Net backward pass with the adapter, divided by those of its forward pass."""
    model = trainee.model
    latent = torch.zeros(1, *model.latent_shape, device=model.unet.device)
    text = embed_prompt(trainee, batch.prompt)[0].detach().requires_grad_()
    eps = []
    forward = flops_of(lambda: eps.append(call_unet(model.unet, latent, torch.tensor(500), text)))
    return flops_of(lambda: eps[0].sum().backward()) / forward


def measure_throughput(config: BenchConfig) -> dict:
    """Return seconds per step, peak memory and share of the peak FLOP/s, with cached and new originals, by micro-batch."""
    rows, k = [], config.gradient.evaluations
    contestants = [Variant("cached", k), Variant("not cached", k, cold=True)]
    for micro_batch in config.micro_batches:
        sized = replace(config, micro_batch=micro_batch)
        trainee = make_trainee(replace(sized, compile=False))  # operations are counted before compilation
        optimizer = torch.optim.AdamW(trainee.adapter.parameters(), 0.0)
        flops, seconds, memory = {}, {v.name: [] for v in contestants}, {}
        for variant in contestants:
            batch = draw(sized, 0)
            warm_up(trainee, batch)
            flops[variant.name] = flops_of(lambda v=variant, b=batch, t=trainee: run_variant(t, b, v, 1))
        if config.compile:
            trainee.model.unet.compile()
        for number in range(config.warmup + config.repeats):
            for variant in contestants:
                batch = draw(sized, number)
                warm_up(trainee, batch)
                took = whole_step(trainee, optimizer, batch, partial(run_variant, variant=variant, literal_batch=1))
                if number >= config.warmup:
                    seconds[variant.name].append(took)
        for variant in contestants:
            batch = draw(sized, 0)
            warm_up(trainee, batch)
            if config.device == "cpu":
                memory[variant.name] = memory_apart(sized, variant, batch)
            else:
                held = torch.cuda.memory_allocated() / 2**20
                needed = peak_memory(config.device, lambda v=variant, b=batch, t=trainee: run_variant(t, b, v, 1))
                memory[variant.name] = held + needed
            median = spread(seconds[variant.name])
            rate = flops[variant.name] / median[0] / 1e12
            rows.append(
                {
                    "originals": variant.name,
                    "micro_batch": micro_batch,
                    "seconds": median,
                    "peak_gib": memory[variant.name] / 1024,
                    "tflop": flops[variant.name] / 1e12,
                    "tflops": rate,
                    "share": rate / config.peak_tflops if config.peak_tflops else None,
                }
            )
        del trainee, optimizer
        forget()
    return {"rows": rows, "K": k or sampler_steps(config), "whole_process": config.device != "cpu"}
