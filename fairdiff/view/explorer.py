"""Generate both images of a prompt from the same noise, without and with a run's adapter, with the audit judge's labels."""

import base64
import io
import math
from pathlib import Path
from threading import Lock

import torch
from PIL import Image

from classifiers.pictures import eight_bits
from fairdiff import builder
from fairdiff.audit.measure import measure
from fairdiff.builder.audit import build_audit_judge, build_generators, build_measurer
from fairdiff.cli.compose import saved
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan

MOST = 8  # images at once
LARGEST = 2.0  # scale of the adapter


class Explorer:
    """A run's model, adapter and audit judge, loaded once; one request at a time."""

    def __init__(self, folder: Path):
        config = saved(folder / "config.yaml", [f"adapter.path={folder / 'adapter'}", "adapter.scale=1"])
        plan = make_plan(config, training=False)
        self.model = builder.build_model(config)
        self.adapter = builder.build_saved_adapter(config, plan, self.model)
        self.full = [parameter.detach().clone() for parameter in self.adapter.parameters()]
        self.measurer, _ = build_measurer(config, build_audit_judge(config, plan), (None, None))
        self.generators = build_generators(config, self.model, self.adapter, config.sampler.guidance)
        self.lock = Lock()

    @torch.no_grad()
    def look(self, request: dict) -> list[dict]:
        """`images` pairs, each with `before` and `after`: a PNG as a data URI and the judge's probabilities by attribute and
        class, {} without a face. request: prompt, scale in [0, 2], seed, images in 1..8. FairDiffError for any other."""
        prompt, scale, seed, images = _checked(request)
        with self.lock:
            for parameter, full in zip(self.adapter.parameters(), self.full, strict=True):
                parameter.data.copy_(full)
            self.adapter.rescale(scale)
            noise = initial_noise(prompt, seed, range(images), self.model.latent_shape)
            return [
                {"before": before, "after": after}
                for before, after in zip(*(self._read(name, prompt, noise) for name in ("before", "after")), strict=True)
            ]

    def _read(self, name: str, prompt: str, noise: torch.Tensor) -> list[dict]:
        image_BCHW = self.generators[name](prompt, noise).float()
        seen = measure(self.measurer, image_BCHW, prompt)
        classes = self.measurer.judge.attributes
        return [
            {
                "image": _uri(image),
                "reading": {
                    a: dict(zip(classes[a], map(float, seen.probs[a][row]), strict=True)) for a in classes if found
                },
            }
            for row, (image, found) in enumerate(zip(image_BCHW, seen.found_B, strict=True))
        ]


def _checked(request: dict) -> tuple[str, float, int, int]:
    prompt, scale, seed, images = (request.get(key) for key in ("prompt", "scale", "seed", "images"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise FairDiffError(f"prompt: found {prompt!r}, allowed: a text")
    if type(scale) not in (int, float) or not math.isfinite(scale) or not 0 <= scale <= LARGEST:
        raise FairDiffError(f"scale: found {scale!r}, allowed: 0 to {LARGEST:g}")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise FairDiffError(f"seed: found {seed!r}, allowed: a whole number from 0 to {2**31 - 1}")
    if type(images) is not int or not 1 <= images <= MOST:
        raise FairDiffError(f"images: found {images!r}, allowed: 1 to {MOST}")
    return prompt.strip(), float(scale), seed, images


def _uri(image_3HW: torch.Tensor) -> str:
    out = io.BytesIO()
    Image.fromarray(eight_bits(image_3HW)).save(out, "png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
