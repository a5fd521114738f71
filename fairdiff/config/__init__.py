"""Every configuration schema with its cross-field laws. What they forbid is a FairDiffError of one line."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.config.frozen import (
    AttributeConfig,
    DetectorConfig,
    FeaturesConfig,
    JudgeConfig,
    ModelConfig,
    SamplerConfig,
)
from fairdiff.config.laws import between, one_of, positive
from fairdiff.config.training import (
    AdapterConfig,
    GradientConfig,
    LossConfig,
    OptimizerConfig,
    PromptsConfig,
    ValidationConfig,
)
from fairdiff.errors import FairDiffError


@dataclass
class AuditConfig:
    """split: of which prompts, "test" or, to choose settings by, "validation". judge: apart from training's.

    prompts: how many prompts of each family (null: all), images_per_prompt: of each.

    unrelated_prompts, unrelated_images: the same of prompts without people. batch_size: pictures painted at once.
    seed: of the noise and the resampling. equivalence: the gap below which the whole interval must lie for "on target".
    drift: by how much the bias of an attribute without a target may change and count as unchanged.
    """

    split: str = "test"
    prompts: int | None = None
    images_per_prompt: int = 60
    unrelated_prompts: int = 6
    unrelated_images: int = 16
    batch_size: int = 120
    seed: int = 20231113
    equivalence: float = 0.10
    drift: float = 0.06
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        one_of("audit.split", self.split, ["test", "validation"])
        for key in ("prompts", "images_per_prompt", "unrelated_prompts", "unrelated_images", "batch_size"):
            positive(f"audit.{key}", asdict(self)[key])
        between("audit.seed", self.seed, 0, 2**31 - 1)
        between("audit.equivalence", self.equivalence, 0.001, 1)
        between("audit.drift", self.drift, 0.001, 1)


@dataclass
class Config:
    """The whole configuration. The run folder and what resumes there: fairdiff/run.py.

    steps: updates of the adapter. global_batch: pictures of each prompt in one of them. noise_pool: noises that each
    prompt has in training, met in slices of global_batch, whole ones; their originals are cached. decode_batch,
    replay_batch: pictures, or (picture, step) pairs, at once, which set the memory and not the result. seed: of everything
    random in training.
    resume: the same command goes on where it stopped, false starts over. checkpoint_every: steps. cache: a folder for
    what the frozen model painted and measured, null for none.

    target: attribute -> class -> share, any shares that sum to 1 per attribute; or `file` ("labour" or a path) or
    `joint`, as fairdiff/objective/target_files.py reads them. `relaxation`: share of the model's own shares mixed in.
    """

    model: ModelConfig = MISSING
    sampler: SamplerConfig = MISSING
    adapter: AdapterConfig = MISSING
    attributes: dict[str, AttributeConfig] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=lambda: {"file": None, "joint": None, "relaxation": 0.0})
    prompts: PromptsConfig = MISSING
    detector: DetectorConfig = MISSING
    judge: JudgeConfig = MISSING
    features: FeaturesConfig = MISSING
    gradient: GradientConfig = MISSING
    loss: LossConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    audit: AuditConfig = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    steps: int = MISSING
    global_batch: int = MISSING
    noise_pool: int = MISSING
    decode_batch: int = 24
    replay_batch: int = 96
    seed: int = 0
    resume: bool = True
    checkpoint_every: int = 10
    cache: str | None = "outputs/cache"

    def __post_init__(self):
        for key in ("steps", "global_batch", "noise_pool", "decode_batch", "replay_batch", "checkpoint_every"):
            positive(key, asdict(self)[key])
        between("seed", self.seed, 0, 2**31 - 1)
        if self.noise_pool < self.global_batch:
            raise FairDiffError(
                f"noise_pool: found {self.noise_pool}, allowed: at least global_batch = {self.global_batch}"
            )
        _check_lengths(self)
        if not self.attributes:
            raise FairDiffError("attribute: found [], allowed: one or more of gender, race, age or your own")
        _check_target(self.attributes, self.target)


def _check_lengths(config: Config) -> None:
    steps, every = config.steps, config.validation.every
    if config.optimizer.warmup >= steps:
        raise FairDiffError(f"optimizer.warmup: found {config.optimizer.warmup}, allowed: less than steps = {steps}")
    if every is not None and every > steps:
        raise FairDiffError(f"validation.every: found {every}, allowed: at most steps = {steps}, or null")
    if every is not None and config.loss.image is None:
        raise FairDiffError("validation.every: needs the encoders of loss.image, which is null; 0 measures only")
    low = config.sampler.train_steps[0]
    if config.gradient.last is not None and config.gradient.last > low:
        raise FairDiffError(f"gradient.last: found {config.gradient.last}, allowed: at most train_steps[0] = {low}")


def _check_target(attributes: dict[str, AttributeConfig], target: dict[str, Any]) -> None:
    options = ("file", "joint", "relaxation")
    for name in target:
        one_of("target", name, [*attributes, *options])
    for name in attributes:
        if name in options:
            raise FairDiffError(f"attributes: found the name {name}, allowed: any but {', '.join(options)}")
    file, joint, relaxation = (target[name] for name in options)
    if file is not None and (joint is not None or not isinstance(file, str)):
        raise FairDiffError(f"target.file: found {file}, allowed: a path or labour, and no target.joint beside it")
    if isinstance(relaxation, bool) or not isinstance(relaxation, int | float):
        raise FairDiffError(f"target.relaxation: found {relaxation}, allowed: 0 to 1")
    between("target.relaxation", relaxation, 0, 1)
    for name, attribute in attributes.items():
        shares = target.get(name)
        if not isinstance(shares, dict):
            raise FairDiffError(
                f"target.{name}: found {shares}, allowed: a share for each of {', '.join(attribute.classes)}"
            )
        for cls, share in shares.items():
            one_of(f"target.{name}", cls, attribute.classes)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise FairDiffError(f"target.{name}.{cls}: found {share}, allowed: a number in [0, 1]")
        missing = [c for c in attribute.classes if c not in shares]
        if missing:
            raise FairDiffError(f"target.{name}: no share for {', '.join(missing)}")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise FairDiffError(f"target.{name}: shares sum to {sum(shares.values()):.6g}, allowed: 1")
