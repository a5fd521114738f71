"""The configuration of scripts/bench.py: a training configuration with the settings of the measurements."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from reproduce.place import OWN

from fairdiff.config import Config, GradientConfig
from fairdiff.config.laws import positive
from fairdiff.errors import FairDiffError

PARTS = ("steps", "variance", "memory", "profile", "audit", "compile", "throughput", "time_to_bias", "ablation")
LEARNERS = "keys of gradient, {type: literal}, {type: autograd} or {type: truncated, last: <steps>}"


@dataclass
class RandomConfig:
    """Shapes of a model and of perception networks with random weights; defaults: Stable Diffusion 1.5 and the paper.

    latent: side of the latents (64 for images of 512 pixels). unet, vae: channels per level. text: width and layers.
    steps: T. clip, dino, judge, identity: timm architectures. *_size: their input in pixels; detect_size: the detector's.
    """

    latent: int = 64
    unet: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    vae: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    text: list[int] = field(default_factory=lambda: [768, 12])
    steps: int = 21
    guidance: float = 7.5
    clip: str = "vit_huge_patch14_clip_224"
    dino: str = "vit_base_patch14_dinov2"
    judge: str = "mobilenetv3_large_100"
    identity: str = "resnet50"
    encoder_size: int = 224
    judge_size: int = 224
    identity_size: int = 112
    detect_size: int = 256


@dataclass
class WatchConfig:
    """How a run is validated: after every `every` steps, with `images` images of each of the last `prompts` prompts."""

    every: int = 6
    prompts: int = 10
    images: int = 48


@dataclass
class BenchConfig(Config):
    """The settings of a training run, and of the measurements.

    part: what to measure, see PARTS. literal_batch: micro-batch of the reference algorithm. sizes: values of B in the tables
    of memory and variance. lengths: values of T in the table of memory. micro_batches: those of throughput. peak_tflops: the
    device's peak. time_to_bias, ablation: the gradients to compare, see LEARNERS. report: the page; its records are in
    measurements/bench beside it.
    """

    part: list[str] = field(default_factory=lambda: ["steps", "variance", "memory", "profile"])
    device: str = "cpu"
    repeats: int = 5
    warmup: int = 1
    literal_batch: int = 8
    sizes: list[int] = field(default_factory=lambda: [6, 12, 24])
    lengths: list[int] = field(default_factory=lambda: [4, 8, 16])
    batches: int = 6
    evaluations: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 8])
    draws: int = 2000
    micro_batches: list[int] = field(default_factory=lambda: [4, 1])
    channels_last: bool = False
    compile: bool = False
    peak_tflops: float | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    thresholds: list[float] = field(default_factory=lambda: [0.20, 0.15])
    time_to_bias: list[Any] = field(
        default_factory=lambda: [{"type": "literal"}, {"type": "unit"}, {"type": "unit", "evaluations": 3}]
    )
    ablation: list[Any] = field(
        default_factory=lambda: [
            {"type": "unit", "evaluations": 3},
            {"type": "reference", "evaluations": 3},
            {"type": "solver", "evaluations": 3},
            {"type": "autograd"},
            {"type": "truncated", "last": 1},
            {"type": "truncated", "last": 2},
            {"type": "truncated", "last": 4},
        ]
    )
    watch: WatchConfig = field(default_factory=WatchConfig)
    random: RandomConfig | None = None
    report: str = str(OWN / "performance.md")

    def __post_init__(self):
        super().__post_init__()
        for part in self.part:
            if part not in PARTS:
                raise FairDiffError(f"part: found {part}, allowed: {', '.join(PARTS)}; an empty list only renders")
        for key in ("repeats", "literal_batch", "batches", "draws"):
            if asdict(self)[key] < 1:
                raise FairDiffError(f"{key}: found {asdict(self)[key]}, allowed: 1 or more")
        positive("micro_batches", *self.micro_batches)
        for key in ("time_to_bias", "ablation"):
            for learner in asdict(self)[key]:
                _check_learner(key, learner)
        if self.random is not None and {"time_to_bias", "ablation"} & {*self.part}:
            raise FairDiffError(f"part: found {self.part}, but a model of random weights has nothing to learn from")


def _check_learner(key: str, learner: Any) -> None:
    match learner:
        case {"type": "literal" | "autograd", **rest} if not rest:
            return
        case {"type": "truncated", "last": int(last), **rest} if last > 0 and not rest:
            return
    try:
        GradientConfig(**learner)
    except TypeError as error:
        raise FairDiffError(f"{key}: found {learner}, allowed: {LEARNERS}") from error


def use_schema() -> None:
    """Make Hydra read conf/config.yaml as a BenchConfig and find the YAML files of this folder."""
    store, here = ConfigStore.instance(), Path(__file__).parent
    store.store(name="schema", node=BenchConfig)
    store.store(name="bench", node=OmegaConf.load(here / "bench.yaml"))
    store.store(group="model", name="sd15_random", node=OmegaConf.load(here / "sd15_random.yaml"), package="_global_")
