"""Configuration of what is trained, on what, by which gradient and losses."""

from dataclasses import asdict, dataclass, field

from omegaconf import MISSING

from fairdiff.config.frozen import MOST_STEPS
from fairdiff.config.laws import between, one_of, positive
from fairdiff.errors import FairDiffError

FAMILIES = ["occupation", "styled", "descriptor", "sport", "object"]


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
    families: family -> how often each of its prompts stands in one round of training (the audit asks each once). The
    family object shows no people: nothing is asked of its pictures but to stay what they are.
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
        positive("prompts.train_limit", self.train_limit)
        positive("prompts.per_step", self.per_step)
        for family, repeats in self.families.items():
            one_of("prompts.families", family, FAMILIES)
            positive(f"prompts.families.{family}", repeats)
        if not set(self.families) - {"object"}:
            found = ", ".join(self.families) or "none"
            raise FairDiffError(f"prompts.families: found {found}, allowed: one or more of {', '.join(FAMILIES[:-1])}")


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
    """The share of the gradient that each term shall hold, all null for no balance: {align: .6, image: .3, face: .1}."""

    align: float | None = None
    image: float | None = None
    face: float | None = None

    def __post_init__(self):
        for name, share in self.shares.items():
            positive(f"loss.balance.{name}", share)
        if self.shares and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise FairDiffError(f"loss.balance: shares sum to {sum(self.shares.values()):.6g}, allowed: 1")

    @property
    def shares(self) -> dict[str, float]:
        """The shares that are set."""
        return {name: share for name, share in asdict(self).items() if share is not None}


@dataclass
class LossConfig:
    """Weights of the terms: 0 measures only, null leaves the term out.

    confidence: least confidence of a transport label that is trained on. draws: samples of the target where transport
    is not exact. class_weights: whether a label weighs in align by how rare its class shall be, see
    `Target.class_weights`; false is the paper's plain cross-entropy, which passes targets that are not uniform.
    originals: the share of a batch whose pictures are compared with the frozen model's, in image and face; what is not
    compared need not be painted, a third of a step's U-Net evaluations where prompts are met once.
    confident_class: how sure of the original's class the judge must be for its face to be kept as it is.
    balance: the share of the gradient that each weighted term shall hold; the weights then only set the size of the
    whole.
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
