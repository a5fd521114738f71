"""Every configuration schema with its cross-field laws. What they forbid is a FairDiffError of one line."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.errors import FairDiffError

FAMILIES = ["occupation", "styled", "descriptor", "sport"]


def _allowed(key: str, found: Any, allowed: list[Any]) -> None:
    if found not in allowed:
        raise FairDiffError(f"{key}: found {found}, allowed: {', '.join(map(str, allowed))}")


def _positive(key: str, *values: float | None) -> None:
    for value in values:
        if value is not None and not value > 0:
            raise FairDiffError(f"{key}: found {value}, allowed: greater than 0")


def _between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise FairDiffError(f"{key}: found {value}, allowed: {low} to {high}")


@dataclass
class ModelConfig:
    """path: null for the embedded Portraits model, else a diffusers folder or hub id.

    dtype: of the frozen U-Net and VAE; adapters, text encoder, latents and losses are float32 whatever it says.
    """

    path: str | None = None
    padding: str = "max_length"
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self):
        _allowed("model.padding", self.padding, ["max_length", "longest"])
        _allowed("model.dtype", self.dtype, ["float32", "bfloat16"])


@dataclass
class SamplerConfig:
    """T is uniform on {train_steps[0] .. train_steps[1]} in training and audit_steps in the audit."""

    scheduler: str = MISSING
    final_sigmas: str = MISSING
    guidance: float = MISSING
    train_steps: list[int] = MISSING
    audit_steps: int = MISSING

    def __post_init__(self):
        _allowed("sampler.scheduler", self.scheduler, ["dpm", "ddim", "euler", "unipc"])
        _allowed("sampler.final_sigmas", self.final_sigmas, ["zero", "sigma_min"])
        _between("sampler.audit_steps", self.audit_steps, 1, 1000)
        _between("sampler.guidance", self.guidance, 0, 100)
        if len(self.train_steps) != 2 or not 0 < self.train_steps[0] <= self.train_steps[1]:
            raise FairDiffError(
                f"sampler.train_steps: found {self.train_steps}, allowed: [low, high] with 0 < low <= high"
            )


@dataclass
class AdapterConfig:
    """type soft_tokens uses `tokens` and `initial_text`, the words they start from; lora `parts`, `rank` and `alpha`.

    path: a saved adapter to start from, or to audit. scale: how much of it, 0 none, 1 as saved; more exaggerates.
    """

    type: str = MISSING
    learning_rate: float = MISSING
    path: str | None = None
    scale: float = 1.0
    tokens: int = 5
    initial_text: str = "a photo of a person"
    parts: list[str] = field(default_factory=list)
    rank: int = 50
    alpha: float = 50

    def __post_init__(self):
        _allowed("adapter.type", self.type, ["soft_tokens", "lora"])
        _positive("adapter.learning_rate", self.learning_rate)
        if not 0 <= self.scale < float("inf") or (self.scale != 1 and self.path is None):
            raise FairDiffError(f"adapter.scale: found {self.scale}, allowed: 0 or more, of a saved adapter.path")
        _between("adapter.tokens", self.tokens, 1, 40)
        _positive("adapter.rank", self.rank)
        _positive("adapter.alpha", self.alpha)
        for part in self.parts:
            _allowed("adapter.parts", part, ["text_encoder", "unet"])
        if self.type == "lora" and not self.parts:
            raise FairDiffError("adapter.parts: found [], allowed: text_encoder, unet or both")


@dataclass
class AttributeConfig:
    """Classes in the judge's order and the damping factors of section A.2 of the paper."""

    classes: list[str] = MISSING
    keep_outside: float = MISSING
    keep_face: float = MISSING

    def __post_init__(self):
        _between("attributes.keep_outside", self.keep_outside, 0, 1)
        _between("attributes.keep_face", self.keep_face, 0, 1)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise FairDiffError(f"attributes.classes: found {self.classes}, allowed: two or more different names")


@dataclass
class PromptsConfig:
    """train/test: null for the embedded world's `families`, else a file as fairdiff/prompts.py reads it.

    families: family -> how often each of its prompts stands in one round of training (the audit asks each once).
    per_step: prompts whose mean gradient makes one step, `global_batch` images each (the paper: 1).

    train_limit takes the first n of a fixed shuffle; null takes all (the audit's number is audit.prompts, the
    validation's validation.prompts). negative: the text of the unconditional branch, in training, originals and audit.
    """

    template: str = MISSING
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    train_limit: int | None = None
    per_step: int = 1
    families: dict[str, int] = field(default_factory=lambda: {"occupation": 1})
    negative: str = ""

    def __post_init__(self):
        _positive("prompts.train_limit", self.train_limit)
        _positive("prompts.per_step", self.per_step)
        for family, repeats in self.families.items():
            _allowed("prompts.families", family, FAMILIES)
            _positive(f"prompts.families.{family}", repeats)
        if not self.families:
            raise FairDiffError(f"prompts.families: found none, allowed: {', '.join(FAMILIES)}")


@dataclass
class DetectorConfig:
    """type mtcnn and insightface resize the shorter side to input_size; whole takes the whole picture as the face.

    root: the folder of insightface's models, which are for non-commercial research and do not come with this project.
    """

    type: str = MISSING
    input_size: int = 64
    crop_size: int = 64
    expand: float = 1.6
    root: str | None = None

    def __post_init__(self):
        _allowed("detector.type", self.type, ["mtcnn", "whole", "insightface"])
        for key in ("input_size", "crop_size", "expand"):
            _positive(f"detector.{key}", asdict(self)[key])
        if self.type == "insightface" and not self.root:
            raise FairDiffError("detector.root: found null, allowed: the folder of insightface's models")


@dataclass
class JudgeConfig:
    """A classifier of perceived presentation.

    type net: a folder as classifiers/attributes.py writes it, null for the embedded one. hf: Hugging Face image
    classifiers. open_clip: zero-shot, a folder or "architecture/pretrained tag". paths: attribute -> its own hf model.
    mapping: attribute -> class -> the model's labels (hf), or prompts (open_clip), that together are this class.
    """

    type: str = "net"
    path: str | None = None
    paths: dict[str, str] = field(default_factory=dict)
    mapping: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _allowed("judge.type", self.type, ["net", "hf", "open_clip"])
        for key, given, users in (("paths", self.paths, ["hf"]), ("mapping", self.mapping, ["hf", "open_clip"])):
            if given and self.type not in users:
                raise FairDiffError(
                    f"judge.{key}: only {' and '.join(users)} judges have it, judge.type is {self.type}"
                )
        for name, classes in self.mapping.items():
            if not isinstance(classes, dict) or not all(isinstance(words, list) for words in classes.values()):
                raise FairDiffError(f"judge.mapping.{name}: found {classes}, allowed: class: [label or prompt, ...]")


@dataclass
class FeaturesConfig:
    """What compares pictures and faces; "embedded" is for Portraits.

    clip: an open_clip folder or "architecture/pretrained tag". encoder: a folder or hub id of a Hugging Face image
    encoder, in DINO's place. identity: a folder of a face embedder and its bank of real faces, null if there is none.
    """

    clip: str = "embedded"
    encoder: str = "embedded"
    identity: str | None = "embedded"


@dataclass
class GradientConfig:
    """evaluations: replayed sampler steps K of T, null for all. detach: of the literal `autograd` loop only.

    last: of `truncated` only, the number k of sampler steps, counted from the end, that autograd goes through.
    """

    type: str = "unit"
    evaluations: int | None = None
    detach: bool = False
    last: int | None = None

    def __post_init__(self):
        _allowed("gradient.type", self.type, ["unit", "reference", "solver", "autograd", "truncated"])
        _positive("gradient.evaluations", self.evaluations)
        _positive("gradient.last", self.last)
        if (self.type == "truncated") != (self.last is not None):
            allowed = "a number of steps" if self.type == "truncated" else "null"
            raise FairDiffError(f"gradient.last: found {self.last} with type {self.type}, allowed: {allowed}")
        if self.detach and self.type != "autograd":
            raise FairDiffError(
                f"gradient.detach: only the literal autograd loop has a choice, {self.type} always detaches"
            )
        if self.type in ("autograd", "truncated") and self.evaluations is not None:
            raise FairDiffError(f"gradient.evaluations: {self.type} goes through its steps by autograd, allowed: null")


@dataclass
class BalanceConfig:
    """The share of the gradient that each term shall hold, all null for no balance: {align: .6, image: .3, face: .1}."""

    align: float | None = None
    image: float | None = None
    face: float | None = None

    def __post_init__(self):
        for name, share in self.shares.items():
            _positive(f"loss.balance.{name}", share)
        if self.shares and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise FairDiffError(f"loss.balance: shares sum to {sum(self.shares.values()):.6g}, allowed: 1")

    @property
    def shares(self) -> dict[str, float]:
        """The shares that are set."""
        return {name: share for name, share in asdict(self).items() if share is not None}


@dataclass
class LossConfig:
    """Weights of the terms: 0 measures only, null leaves the term out.

    balance: the share of the gradient that each weighted term shall hold; the weights then only set the size of the
    whole.
    """

    align: float = 1.0
    image: float | None = 8.0
    face: float | None = 1.0
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    confidence: float = 0.8
    confident_class: float = 0.9
    draws: int = 256

    def __post_init__(self):
        for name in ("align", "image", "face"):
            value = asdict(self)[name]
            if value is not None and not 0 <= value < float("inf"):
                raise FairDiffError(f"loss.{name}: found {value}, allowed: 0 or more, or null")
        if not 0.5 <= self.confidence < 1:
            raise FairDiffError(f"loss.confidence: found {self.confidence}, allowed: [0.5, 1)")
        _positive("loss.draws", self.draws)
        shares, weighted = self.balance.shares, [name for name in ("align", "image", "face") if asdict(self)[name]]
        if shares and set(shares) != set(weighted):
            raise FairDiffError(f"loss.balance: found {', '.join(shares)}, allowed: exactly {', '.join(weighted)}")


@dataclass
class OptimizerConfig:
    """schedule: of the learning rate after `warmup` steps; linear and cosine end at 0 after `steps` steps.

    ema: the decay of the averages after diffusers' warm-up, min(ema, (1 + i) / (10 + i)) at step i.
    """

    weight_decay: float = 1e-2
    max_grad_norm: float | None = 1.0
    ema: float = 0.996
    schedule: str = "constant"
    warmup: int = 0

    def __post_init__(self):
        _allowed("optimizer.schedule", self.schedule, ["constant", "linear", "cosine"])
        _between("optimizer.warmup", self.warmup, 0, 10**9)
        _positive("optimizer.max_grad_norm", self.max_grad_norm)
        _between("optimizer.weight_decay", self.weight_decay, 0, 1)
        if not 0 <= self.ema < 1:
            raise FairDiffError(f"optimizer.ema: found {self.ema}, allowed: [0, 1)")


@dataclass
class ValidationConfig:
    """every: steps between validations of the averaged adapter, null for none; the best one is then what is saved.

    prompts: how many (null: all), images: of each, sampler_steps: null for sampler.audit_steps. floor: least mean
    cosine to the originals over CLIP-I and the image encoder (the paper's adapters keep .62 to .74). patience:
    validations in a row without a new best after which training stops, null for never.
    """

    every: int | None = None
    prompts: int | None = 10
    images: int = 24
    sampler_steps: int | None = None
    floor: float = 0.5
    patience: int | None = 5

    def __post_init__(self):
        for key in ("every", "prompts", "images", "sampler_steps", "patience"):
            _positive(f"validation.{key}", asdict(self)[key])
        _between("validation.floor", self.floor, -1, 1)


@dataclass
class AuditConfig:
    """prompts: how many test prompts of each family (null: all). judge: configured apart from the training one."""

    prompts: int | None = None
    images_per_prompt: int = 60
    unrelated_prompts: int = 6
    unrelated_images: int = 16
    batch_size: int = 120
    seed: int = 20231113
    equivalence: float = 0.10
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        for key in ("prompts", "images_per_prompt", "unrelated_prompts", "unrelated_images", "batch_size"):
            _positive(f"audit.{key}", asdict(self)[key])


@dataclass
class Config:
    """The whole configuration.

    target: attribute -> class -> share, any shares that sum to 1 per attribute; or `file` ("labour" or a path) or
    `joint`, as fairdiff/target_files.py reads them. `relaxation`: how much of the model's own shares is mixed in, [0, 1].
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
            _positive(key, asdict(self)[key])
        _between("seed", self.seed, 0, 2**31 - 1)
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
        _allowed("target", name, [*attributes, *options])
    for name in attributes:
        if name in options:
            raise FairDiffError(f"attributes: found the name {name}, allowed: any but {', '.join(options)}")
    file, joint, relaxation = (target[name] for name in options)
    if file is not None and (joint is not None or not isinstance(file, str)):
        raise FairDiffError(f"target.file: found {file}, allowed: a path or labour, and no target.joint beside it")
    if isinstance(relaxation, bool) or not isinstance(relaxation, int | float):
        raise FairDiffError(f"target.relaxation: found {relaxation}, allowed: 0 to 1")
    _between("target.relaxation", relaxation, 0, 1)
    for name, attribute in attributes.items():
        shares = target.get(name)
        if not isinstance(shares, dict):
            raise FairDiffError(
                f"target.{name}: found {shares}, allowed: a share for each of {', '.join(attribute.classes)}"
            )
        for cls, share in shares.items():
            _allowed(f"target.{name}", cls, attribute.classes)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise FairDiffError(f"target.{name}.{cls}: found {share}, allowed: a number in [0, 1]")
        missing = [c for c in attribute.classes if c not in shares]
        if missing:
            raise FairDiffError(f"target.{name}: no share for {', '.join(missing)}")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise FairDiffError(f"target.{name}: shares sum to {sum(shares.values()):.6g}, allowed: 1")
