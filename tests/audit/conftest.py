import pytest
from tiny_world import BrightSquare, ColourJudge, RandomEncoder, TinyPrompt

from fairdiff.audit.generate import AuditPlan
from fairdiff.audit.measure import Measurer
from fairdiff.diffusion.sampling import initial_noise


@pytest.fixture
def measurer() -> Measurer:
    encoder = RandomEncoder()
    return Measurer(BrightSquare(), ColourJudge(), encoder, encoder, crop_size=8, expand=1.0)


@pytest.fixture
def plan() -> AuditPlan:
    people = [TinyPrompt(f"a photo of the face of a {s}, a person", "occupation", s) for s in ("nurse", "pilot", "baker")]
    return AuditPlan(
        prompts=people,
        without_people=[TinyPrompt(f"a {name}", "object", name, people=False) for name in ("teapot", "tree")],
        attributes=ColourJudge.attributes, images_per_prompt=24, few_images=6, batch_size=10, seed=7,
        latent_shape=(3, 4, 4), hashes={"before": "b0", "start": "s0", "after": "a0", "judge": "j0"},
    )  # fmt: skip


@pytest.fixture
def noise():
    return initial_noise
