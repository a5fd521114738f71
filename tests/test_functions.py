"""fairdiff.audit of functions and of pipelines without latents: their own images are measured."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from tiny_flow import flux, sd3

import fairdiff
from fairdiff.diffusion.functions import check_function, of_function, of_pipeline, seeds
from fairdiff.diffusion.plain import LoadedAdapter
from fairdiff.errors import FairDiffError

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a photo of the face of a nurse, a person", "a photo of the face of a carpenter, a person"]
SMALL = ["model=portraits", "audit.images_per_prompt=6", "micro_batch=1"]


def test_seeds_are_of_the_image_and_of_nothing_else():
    one = seeds("a nurse", 7, range(50), ())
    assert torch.equal(seeds("a nurse", 7, [3, 40], ()), one[[3, 40]]) and len(set(one.tolist())) == 50
    assert 0 <= int(one.min()) and int(one.max()) < 2**31
    others = torch.cat([seeds("a nurse", 8, range(50), ()), seeds("a pilot", 7, range(50), ())])
    assert not set(one.tolist()) & set(others.tolist())


def test_images_and_tensors_are_read_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    as_images = of_function(lambda prompts, some: [Image.fromarray(p) for p in pixels], "pipe", "cpu")
    as_tensor = of_function(lambda prompts, some: torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "pipe", "cpu")
    assert torch.equal(as_images("x", torch.arange(3)), as_tensor("x", torch.arange(3)))
    half = of_function(lambda prompts, some: [Image.new("RGBA", (16, 16), (255, 0, 0, 0))], "pipe", "cpu")
    assert torch.equal(half("x", torch.arange(1)), torch.ones(1, 3, 16, 16))  # over white, as picture files


def picture(size=16, mode="RGB"):
    return Image.new(mode, (size, size))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "returned a NoneType, allowed: a list of PIL images, or a tensor"),
        ([1, 2], "returned a list, allowed"),
        (np.zeros((2, 3, 16, 16)), "returned a ndarray, allowed"),
        ([picture()], "returned 1 images of 1 sizes, allowed: 2 of one size"),
        ([picture(), picture(20)], "returned 2 images of 2 sizes"),
        ([picture(mode="F"), picture(mode="F")], "returned an image that is none: 32 bits a pixel"),
        (torch.zeros(2, 16, 16, 3), r"returned a tensor \(2, 16, 16, 3\) of torch.float32, allowed: \[2, 3, height, width\]"),
        (torch.zeros(1, 3, 16, 16), r"returned a tensor \(1, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "returned .* of torch.uint8, allowed: .* floats"),
    ],
)
def test_what_are_no_images_is_one_line(returned, says):
    with pytest.raises(FairDiffError, match=f"^pipe: {says}"):
        of_function(lambda prompts, some: returned, "pipe", "cpu")("x", torch.arange(2))


def one(prompts):
    return prompts


class Model:
    def __call__(self, prompts, seeds, steps=3):
        return None


def test_what_takes_two_arguments_is_a_function_and_nothing_else_is():
    for given in (lambda p, s: None, Model(), Model().__call__, functools.partial(Model(), steps=2), lambda *a: None, max):
        check_function(given, "pipe")
    for given, says in (
        (one, r"found the function one, which takes \(prompts\)"),
        (Model, "found the class Model"),
        (3, "found a int"),
        (torch.nn.Linear(2, 2), r"found a Linear, which takes \(input"),
    ):
        with pytest.raises(FairDiffError, match=rf"^pipe: {says}.*, allowed: a function \(prompts, seeds\) -> images"):
            check_function(given, "pipe")


@pytest.fixture(scope="module")
def shown() -> dict[str, np.ndarray]:
    """Pictures that Portraits generated, uint8 [6, 64, 64, 3] of each prompt."""
    sheet = np.asarray(Image.open(ROOT / "docs" / "images" / "generated.jpg").convert("RGB"))
    tiles = [sheet[:64, x : x + 64] for x in range(0, 768, 64)]
    return {PROMPTS[0]: np.stack(tiles[:6]), PROMPTS[1]: np.stack(tiles[6:])}


class Stored:
    """A function that returns stored images of the prompts, chosen by the seed, and records its calls."""

    def __init__(self, shown, shift=0):
        self.shown, self.shift, self.asked = shown, shift, []

    def __call__(self, prompts, seeds):
        self.asked += [*zip(prompts, seeds, strict=True)]
        picked = [self.shown[p][(s + self.shift) % len(self.shown[p])] for p, s in zip(prompts, seeds, strict=True)]
        return [Image.fromarray(pixels) for pixels in picked]


def test_a_function_is_audited_and_another_is_compared_on_the_same_seeds(shown):
    before, after = Stored(shown), Stored(shown, 1)
    result = fairdiff.audit(before, PROMPTS, after=after, settings=SMALL)
    assert before.asked == after.asked and len(before.asked) == 12 and len(set(before.asked)) == 12
    assert {p for p, _ in before.asked} == {*PROMPTS}
    assert [*result.numbers["models"]] == ["before", "after"] and result.numbers["paired"]["pairs"] == 12
    assert "before: function Stored" in result.numbers["provenance"]["model"]
    assert "guidance" not in result.numbers["provenance"] and "gender" in result.bias
    alone = fairdiff.audit(Stored(shown), PROMPTS, settings=[*SMALL, "micro_batch=24"])
    counts = [m["models"]["before"]["attributes"]["gender"]["per_prompt"] for m in (result.numbers, alone.numbers)]
    assert [p["counts"] for p in counts[0]] == [p["counts"] for p in counts[1]]  # whatever the batch
    assert result.records.found.mean() > 0.8


@pytest.mark.parametrize("make,kind", [(sd3, StableDiffusion3Pipeline), (flux, FluxPipeline)])
def test_flow_pipelines_are_audited_as_they_stand(make, kind, tmp_path):
    """The audit's images are those of the pipeline's own call with the same seeds."""
    pipe = kind.from_pretrained(make(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    own = {"guidance_scale": 2.0, "num_inference_steps": 2}
    if kind is FluxPipeline:
        own |= {"height": 16, "width": 16}
    ours = of_pipeline(pipe, own)(["a nurse"] * 2, [5, 9])
    each = [
        pipe(prompt="a nurse", generator=torch.Generator().manual_seed(s), output_type="pt", **own).images for s in (5, 9)
    ]
    assert torch.allclose(ours, torch.cat(each), atol=1e-4) and ours.shape == (2, 3, 16, 16)
    few = ["audit.images_per_prompt=2", "sampler.audit_steps=2", "detector=whole", "features.clip=embedded"]
    few += ["features.encoder=embedded", "judge@audit.judge=net", "audit.calibration=none", "model.device=cpu"]
    if kind is StableDiffusion3Pipeline:  # FLUX has no size of its own that is small
        result = fairdiff.audit(pipe, ["a nurse", "a chef"], settings=few)
        assert result.numbers["provenance"]["model"].startswith("before: ") and len(result.records) == 4
        assert result.records.clip_t.notna().all()


def test_what_cannot_be_audited_is_one_line(tiny_folder, shown):
    plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, **plain)
    stored = Stored(shown)
    adapter = LoadedAdapter(pipe, "x", 1.0)
    for arguments, says in (
        ({"pipe": StableDiffusionImg2ImgPipeline(**pipe.components)}, "^pipe: found a StableDiffusionImg2Img.*, allowed"),
        ({"pipe": "outputs/model"}, "^pipe: found a str, allowed: a pipeline of Stable Diffusion, .*FLUX, or a function"),
        ({"pipe": one}, "^pipe: found the function one, which takes"),
        ({"pipe": stored, "after": 3}, "^after: found a int, allowed"),
        ({"pipe": stored, "adapter": adapter}, "^adapter: found one beside function Stored"),
        ({"pipe": pipe, "after": stored, "adapter": adapter}, "^adapter: found one beside after"),
        ({"pipe": stored, "settings": ["model=portraits", "audit.guidance=[2]"]}, "^audit.guidance: found .2.0., allowed"),
        ({"pipe": stored, "settings": ["plan=true"]}, "^plan: found true"),
        ({"pipe": lambda p, s: torch.full((len(p), 3, 32, 32), 7.0), "settings": SMALL}, "values 7.0 to 7.0, allowed"),
    ):
        with pytest.raises(FairDiffError, match=says) as error:
            fairdiff.audit(prompts=PROMPTS, **arguments)
        assert "\n" not in str(error.value)
