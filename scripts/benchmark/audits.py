"""Benchmark an audit: images per second compared with diffusers' pipeline, and the seconds of all its intervals."""

import time
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmark.config import BenchConfig
from benchmark.instruments import spread
from benchmark.world import make_world, synchronise
from fairdiff import builder
from fairdiff.audit.measure import measure
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.records import probability_columns
from fairdiff.builder.audit import build_audit_judge, build_measurer, build_spec
from fairdiff.diffusion import plain
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan

PROMPTS, IMAGES = 50, 160  # prompts, and images per prompt, of the records whose intervals are timed
PIPELINE, SAME = "diffusers' pipeline", "ours, in its precision"
OURS, WHOLE = "ours", "ours, with faces, classifier and encoders"


def measure_audit(config: BenchConfig) -> dict:
    """Let every contestant in turn generate `global_batch` images of the same prompt and noise; a round is one prompt."""
    plan = make_plan(config)
    model, _ = make_world(config, plan)
    if model.kind is not StableDiffusionPipeline:
        raise FairDiffError(f"part: found audit with {model.kind.__name__}, allowed: a model of Stable Diffusion 1 or 2")
    text, vae = (deepcopy(module).to(model.unet.dtype) for module in (model.text_encoder, model.vae))
    pipe = StableDiffusionPipeline(vae, text, model.tokenizer, model.unet, model.scheduler, None, None)
    size, T = config.global_batch, config.sampler.audit_steps
    model.sample_batch = model.decode_batch = size
    theirs = plain.generator(pipe, {"guidance_scale": config.sampler.guidance, "num_inference_steps": T})
    lower, ours = model.sampling_dtype, model.generator(config.sampler.guidance, T)

    def sampled_in(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
        def generate(prompt: str, noise_BCHW: Tensor) -> Tensor:
            model.sampling_dtype = dtype
            return ours(prompt, noise_BCHW)

        return generate

    contestants = {PIPELINE: theirs, SAME: sampled_in(torch.float32), OURS: sampled_in(lower)}
    intervals = None
    if config.random is None:
        judge = build_audit_judge(config, plan)
        encoders = builder.build_encoders(config.features.clip, config.features.encoder, config.model.device)
        measurer, _ = build_measurer(config, judge, encoders)
        contestants[WHOLE] = _measured(contestants[OURS], measurer)
        intervals = _seconds_of_intervals(build_spec(config, plan, judge, None, {}))
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    apart = {SAME: 0.0, OURS: 0.0}
    for number in range(config.warmup + config.repeats):
        prompt = plan.train[number % len(plan.train)].text
        noise = initial_noise(prompt, config.seed, range(size), model.latent_shape).to(config.device)
        drawn = {}
        for name, generate in contestants.items():
            synchronise(config.device)
            began = time.perf_counter()
            drawn[name] = generate(prompt, noise)
            synchronise(config.device)
            if number >= config.warmup:
                rates[name].append(size / (time.perf_counter() - began))
        for name in apart:
            apart[name] = max(apart[name], (drawn[name] - drawn[PIPELINE]).abs().max().item())
    rows = [
        {
            "contestant": name,
            "images_per_second": spread(own),
            "faster": spread([a / b for a, b in zip(own, rates[PIPELINE], strict=True)]),
            "apart": apart.get(name),
        }
        for name, own in rates.items()
    ]
    return {"rows": rows, "T": T, "dtype": str(lower).removeprefix("torch."), "intervals": intervals}


def _measured(generate: Callable[[str, Tensor], Tensor], measurer) -> Callable[[str, Tensor], Tensor]:
    def whole(prompt: str, noise_BCHW: Tensor) -> Tensor:
        image_BCHW = generate(prompt, noise_BCHW)
        measure(measurer, image_BCHW, prompt)
        return image_BCHW

    return whole


def _seconds_of_intervals(spec) -> dict:
    """Time the computation of audit.json from random records of PROMPTS x IMAGES faces before and after.

    There is one pass only, because a second one in the same process would use null distributions and plans of the first.
    """
    rng, n = np.random.default_rng(0), PROMPTS * IMAGES
    tables = []
    for model in ("before", "after"):
        share_P = rng.beta(2, 2, PROMPTS).repeat(IMAGES)
        columns = {"model": model, "family": "occupation", "people": True, "names": ""}
        place_N = np.arange(PROMPTS).repeat(IMAGES)
        columns |= {"prompt_index": place_N, "subject": place_N.astype(str), "prompt": place_N.astype(str)}
        columns |= {"image_index": np.tile(np.arange(IMAGES), PROMPTS), "seed": 0, "found": rng.random(n) < 0.99, "faces": 1}
        for name, classes in spec.attributes.items():
            probs_NK = rng.dirichlet([0.1] * len(classes), n)
            first_N = rng.random(n) < share_P  # the likeliest class is class 0 with the prompt's probability
            probs_NK = np.where(first_N[:, None], -np.sort(-probs_NK), probs_NK)
            columns |= dict(zip(probability_columns({name: classes}), probs_NK.T, strict=True))
        columns |= {name: rng.normal(0.3, 0.02, n) for name in ("clip_t", "clip_i", "dino", "between")}
        tables.append(pd.DataFrame(columns | {"model_hash": model, "judge_hash": "judge"}))
    records, began = pd.concat(tables, ignore_index=True), time.perf_counter()
    compute_metrics(records, spec)
    took = time.perf_counter() - began
    return {"prompts": PROMPTS, "images": IMAGES, "attributes": list(spec.attributes), "seconds": took}
