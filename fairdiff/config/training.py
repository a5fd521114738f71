"""Configuration of what is trained, on what, by which gradient and losses."""

from dataclasses import asdict, dataclass, field

from omegaconf import MISSING

from fairdiff.config.frozen import MOST_STEPS
from fairdiff.config.laws import between, one_of, positive
from fairdiff.errors import FairDiffError

FAMILIES = ["occupation", "styled", "descriptor", "sport"]


@dataclass
class AdapterConfig:
    """type soft_tokens uses `tokens` and `initial_text`, the words they start from; lora `parts`, `rank` and `alpha`.

    learning_rate: of AdamW, before `optimizer.schedule`.
    path: a saved adapter to start from, or to audit. scale: how much of what it learnt, 0 none (soft
    tokens: the initial words), 1 as saved; more exaggerates.
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
        one_of("adapter.type", self.type, ["soft_tokens", "lora"])
        positive("adapter.learning_rate", self.learning_rate)
        if not 0 <= self.scale < float("inf") or (self.scale != 1 and self.path is None):
            raise FairDiffError(f"adapter.scale: found {self.scale}, allowed: 0 or more, of a saved adapter.path")
        between("adapter.tokens", self.tokens, 1, 40)
        positive("adapter.rank", self.rank)
        positive("adapter.alpha", self.alpha)
        for part in self.parts:
            one_of("adapter.parts", part, ["text_encoder", "unet"])
        if self.type == "lora" and not self.parts:
            raise FairDiffError("adapter.parts: found [], allowed: text_encoder, unet or both")


@dataclass
class PromptsConfig:
    """train/validation/test: null for the embedded world's `families`, else a file as fairdiff/prompts.py reads it.

    template: what subjects are put into, "a photo of a {}"; "{}" takes the lines of a file as whole prompts.
    families: family -> how often each of its prompts stands in one round of training (the audit takes each once).
    without_people: the share of training prompts that show no people, whose images are only to stay what they are: those
    of the family object in the file, else the embedded ones; none where the image term has no weight.
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
    without_people: float = 0.0
    negative: str = ""

    def __post_init__(self):
        if not 0 <= self.without_people < 1:
            raise FairDiffError(f"prompts.without_people: found {self.without_people}, allowed: [0, 1)")
        positive("prompts.train_limit", self.train_limit)
        positive("prompts.per_step", self.per_step)
        for family, repeats in self.families.items():
            one_of("prompts.families", family, FAMILIES)
            positive(f"prompts.families.{family}", repeats)
        if not self.families:
            raise FairDiffError(f"prompts.families: found none, allowed: one or more of {', '.join(FAMILIES)}")


@dataclass
class GradientConfig:
    """type: what each sampler step's part of the gradient is multiplied by, see `sampling.gradient_weights`.

    unit (the paper's: all the same), reference (of its published code), solver (the solver's own); autograd and
    truncated go through the sampler literally. evaluations: replayed sampler steps K of T, null for all. detach: of
    `autograd` only, leaves out what flows through the U-Net's inputs.

    last: of `truncated` only, the number k of sampler steps, counted from the end, that autograd goes through.
    """

    type: str = "unit"
    evaluations: int | None = None
    detach: bool = False
    last: int | None = None

    def __post_init__(self):
        one_of("gradient.type", self.type, ["unit", "reference", "solver", "autograd", "truncated"])
        positive("gradient.evaluations", self.evaluations)
        positive("gradient.last", self.last)
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
    """The shares of the gradient that terms shall hold, relative to each other; all null for no balance."""

    align: float | None = None
    image: float | None = None
    face: float | None = None

    def __post_init__(self):
        for name, share in asdict(self).items():
            positive(f"loss.balance.{name}", share)


@dataclass
class LossConfig:
    """Weights of the terms: 0 measures only, null leaves the term out.

    confidence: least confidence of a transport label that is trained on. draws: samples of the target where transport
    is not exact. class_weights: whether a label weighs in align by how rare its class shall be, see
    `Target.class_weights`; false is the paper's plain cross-entropy, which passes targets that are not uniform.
    originals: the share of a batch whose pictures are compared with the frozen model's, in image and face; what is not
    compared need not be painted, a third of a step's U-Net evaluations where prompts are met once.
    confident_class: how sure of the original's class the judge must be for its face to be kept as it is.
    balance: the share of the gradient that each term shall hold; it takes the place of weights.
    """

    align: float = 1.0
    image: float | None = 8.0
    face: float | None = 1.0
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    confidence: float = 0.8
    class_weights: bool = True
    originals: float = 1.0
    confident_class: float = 0.9
    draws: int = 256

    def __post_init__(self):
        for name in ("align", "image", "face"):
            value = asdict(self)[name]
            if value is not None and not 0 <= value < float("inf"):
                raise FairDiffError(f"loss.{name}: found {value}, allowed: 0 or more, or null")
        if not 0.5 <= self.confidence < 1:
            raise FairDiffError(f"loss.confidence: found {self.confidence}, allowed: [0.5, 1)")
        if not 0 < self.originals <= 1:
            raise FairDiffError(f"loss.originals: found {self.originals}, allowed: (0, 1]")
        if self.originals < 1 and not self.align:  # a batch may have none that is compared, and then has nothing to learn
            raise FairDiffError(f"loss.originals: found {self.originals:g} without loss.align, allowed: 1")
        between("loss.confident_class", self.confident_class, 0, 1)
        positive("loss.draws", self.draws)
        for name in ("align", "image", "face") if self.shares else ():
            value = asdict(self)[name]
            if value not in (0, 1, None):
                raise FairDiffError(
                    f"loss.{name}: found {value:g} beside loss.balance, whose shares replace weights; allowed: 1, 0 "
                    f"(measured only), null, another loss.balance.{name}, or loss=paper for weights"
                )
            if value and name not in self.shares:
                raise FairDiffError(f"loss.balance.{name}: found null, allowed: a share, as other terms have one")

    @property
    def shares(self) -> dict[str, float]:
        """The share of the gradient that each term with a weight shall hold; they sum to 1. {} for no balance."""
        set_ = {name: share for name, share in asdict(self.balance).items() if share is not None and asdict(self)[name]}
        return {name: share / sum(set_.values()) for name, share in set_.items()}


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
        one_of("optimizer.schedule", self.schedule, ["constant", "linear", "cosine"])
        between("optimizer.warmup", self.warmup, 0, 10**9)
        positive("optimizer.max_grad_norm", self.max_grad_norm)
        between("optimizer.weight_decay", self.weight_decay, 0, 1)
        if not 0 <= self.ema < 1:
            raise FairDiffError(f"optimizer.ema: found {self.ema}, allowed: [0, 1)")


@dataclass
class ValidationConfig:
    """every: steps between validations of the averaged adapter, null for none; the best one is then what is saved.

    prompts: how many of each family (null: all), images: of each prompt, sampler_steps: null for sampler.audit_steps.
    floor: least mean cosine to the originals over CLIP-I and the image encoder. What a picture keeps depends on the
    encoders: the paper's adapters keep .62 to .74 of photographs, those of Portraits .90 to .97 (conf/model).
    patience: validations in a row without a new best after which training stops, null for never.
    """

    every: int | None = None
    prompts: int | None = 10
    images: int = 24
    sampler_steps: int | None = None
    floor: float = 0.5
    patience: int | None = 5

    def __post_init__(self):
        for key in ("every", "prompts", "images", "sampler_steps", "patience"):
            positive(f"validation.{key}", asdict(self)[key])
        between("validation.sampler_steps", self.sampler_steps or 1, 1, MOST_STEPS)
        between("validation.floor", self.floor, -1, 1)
