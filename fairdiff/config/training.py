"""Configuration of training: adapter, prompts, gradient, losses, optimizer, validation."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.config.laws import between, one_of, positive
from fairdiff.errors import FairDiffError

OWN_KEYS = {"soft_tokens": ("tokens", "initial_text"), "lora": ("parts", "rank")}  # of `adapter`, of one type alone


@dataclass
class AdapterConfig:
    """The adapter that is trained.

    type: lora, or soft_tokens, which are trained embeddings before the prompt.
    tokens: Number of soft tokens, from 1 to 40.
    initial_text: Words whose embeddings the soft tokens start from, repeated until there are enough.
    parts: Where LoRA is added: text_encoder, unet or both. text_encoder means all CLIP text encoders of the model; unet
    means the transformer in models that have one instead.
    rank: Rank of LoRA. Its alpha is the same.
    learning_rate: Learning rate of AdamW at the start of `optimizer.schedule`.
    path: Saved adapter to start from or to audit; null starts a new one. A folder must have been made with the same
    settings of `adapter`. A file of any tool is taken with its own layers, ranks or tokens. Several in a list are added up.
    scale: Factor on what the adapter of `path` has learnt, 0 or more: 0 turns it off (soft tokens are then their initial
    words), 1 is as saved, more exaggerates. A list has one for each path.
    """

    type: str = MISSING
    learning_rate: float = MISSING
    path: Any = None
    scale: Any = 1.0
    tokens: int = 5
    initial_text: str = "a photo of a person"
    parts: list[str] = field(default_factory=list)
    rank: int = 50

    def __post_init__(self):
        one_of("adapter.type", self.type, ["soft_tokens", "lora"])
        positive("adapter.learning_rate", self.learning_rate)
        self._check_path()
        between("adapter.tokens", self.tokens, 1, 40)
        positive("adapter.rank", self.rank)
        for part in self.parts:
            one_of("adapter.parts", part, ["text_encoder", "unet"])
        if self.type == "lora" and not self.parts:
            raise FairDiffError("adapter.parts: found [], allowed: text_encoder, unet or both")

    def _check_path(self) -> None:
        paths = self.path if isinstance(self.path, list) else [self.path or ""]
        if not paths or not all(isinstance(path, str) for path in paths):
            raise FairDiffError(f"adapter.path: found {self.path}, allowed: a path, a list of paths, or null")
        scales = self.scale if isinstance(self.scale, list) else [self.scale]
        numbers = all(isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales)
        if not numbers or not all(0 <= s < float("inf") for s in scales) or (self.path is None and scales != [1]):
            raise FairDiffError(f"adapter.scale: found {self.scale}, allowed: 0 or more, of a saved adapter.path")
        if isinstance(self.scale, list) and len(scales) != len(paths):
            raise FairDiffError(
                f"adapter.scale: found {len(scales)} for {len(paths)} of adapter.path, allowed: one for each, or one for all"
            )
        self.scale = [float(s) for s in scales] if isinstance(self.scale, list) else float(self.scale)

    @property
    def paths(self) -> list[str]:
        """`path` as a list, [] for none."""
        return self.path if isinstance(self.path, list) else [self.path] if self.path else []

    @property
    def scales(self) -> list[float]:
        """The scale of each path."""
        return self.scale if isinstance(self.scale, list) else [self.scale] * len(self.paths)


@dataclass
class PromptsConfig:
    """The prompts of training, validation and audit.

    train, validation, test: File of the prompts of this split, in a format of fairdiff/prompts.py. null takes the embedded
    prompts of `families`.
    template: The words around a subject, such as "a photo of {a} {}". "{}" takes the lines of a file as whole prompts.
    families: Families of prompts, each with the number of times that its prompts are repeated in one epoch of training.
    Audits take each prompt once.
    without_people: Share of the training prompts that show no people, below 1. They have the image term only, so that such
    images stay as they are. They come from the file, else from the embedded prompts. There are none if `loss.image` is 0 or
    null.
    named: Share of the training prompts that name a class ("..., a woman"), below 1. Their target is that class, so that
    the model keeps showing what a prompt names.
    per_step: Number of prompts in one step, with `global_batch` images each. Their gradients are averaged; the paper has 1.
    negative: Negative prompt, in training, reference images and audit.
    """

    template: str = "a photo of the face of {a} {}, a person"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    per_step: int = 1
    families: dict[str, int] = field(default_factory=lambda: {"occupation": 1})
    without_people: float = 0.0
    named: float = 0.0
    negative: str = ""

    def __post_init__(self):
        for key in ("without_people", "named"):
            if not 0 <= asdict(self)[key] < 1:
                raise FairDiffError(f"prompts.{key}: found {asdict(self)[key]}, allowed: [0, 1)")
        if self.without_people + self.named >= 1:
            raise FairDiffError(
                f"prompts.named: found {self.named} beside prompts.without_people={self.without_people}, allowed: below 1 "
                "together"
            )
        positive("prompts.per_step", self.per_step)
        for family, repeats in self.families.items():
            positive(f"prompts.families.{family}", repeats)
        if not self.families:
            raise FairDiffError("prompts.families: found none, allowed: one or more families of the prompt set")


@dataclass
class GradientConfig:
    """How the gradient is taken through the sampler.

    type: Weight of each sampler step's gradient: unit (the same for every step, as in the paper), reference (as in the
    published code) or solver (the solver's own coefficients). docs/explanation/method.md has the formulas.
    evaluations: Number of sampler steps replayed with a gradient for each image, chosen at random; null replays all of
    them.
    """

    type: str = "unit"
    evaluations: int | None = None

    def __post_init__(self):
        one_of("gradient.type", self.type, ["unit", "reference", "solver"])
        positive("gradient.evaluations", self.evaluations)


@dataclass
class LossConfig:
    """The three terms of the loss and their weights.

    align: Weight of the alignment term, the cross-entropy to labels that follow the target. With `balance` it is the term's
    share of the gradient, relative to the other terms. 0 only measures the term.
    image: Weight of the image term, which keeps images like their reference images; read as `align`. null leaves the term
    out.
    face: Weight of the face term, which keeps faces like real ones; read as `align`. null leaves the term out.
    balance: Whether the gradients of the terms are rescaled in every step so that they have the given shares. false uses
    the weights as they are.
    confidence: Smallest confidence, from .5 to below 1, of an optimal-transport label that is trained on.
    class_weights: Whether the cross-entropy of a label is weighted by 1 / (classes * target share), so that targets that
    are not uniform are not overshot. false is the paper's plain cross-entropy.
    confident_class: Smallest probability of the reference image's class, from 0 to 1, at which the face term keeps a face
    like that of its reference image. Other faces move to the nearest face of the bank.
    originals: Share of each batch that is compared with reference images in the image and face terms, above 0 and up to 1.
    They weigh 1 / share. A smaller share saves time, because fewer reference images are sampled.
    """

    balance: bool = True
    align: float = 0.75
    image: float | None = 0.4
    face: float | None = 0.08
    confidence: float = 0.8
    confident_class: float = 0.9
    class_weights: bool = True
    originals: float = 1.0

    def __post_init__(self):
        for name in ("align", "image", "face"):
            value = asdict(self)[name]
            if value is not None and not 0 <= value < float("inf"):
                raise FairDiffError(f"loss.{name}: found {value}, allowed: 0 or more, or null")
        if not (self.align or self.image or self.face):
            raise FairDiffError("loss: found no weight above 0, allowed: one of align, image and face, or nothing is learnt")
        if not 0.5 <= self.confidence < 1:
            raise FairDiffError(f"loss.confidence: found {self.confidence}, allowed: [0.5, 1)")
        if not 0 < self.originals <= 1:
            raise FairDiffError(f"loss.originals: found {self.originals}, allowed: (0, 1]")
        if self.originals < 1 and not self.align:  # a batch without one to compare has nothing to learn
            raise FairDiffError(f"loss.originals: found {self.originals:g} without loss.align, allowed: 1")
        between("loss.confident_class", self.confident_class, 0, 1)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the gradient that each trained term shall hold; they sum to 1. {} without `balance`."""
        terms = {"align": self.align, "image": self.image, "face": self.face} if self.balance else {}
        trained = {name: share for name, share in terms.items() if share}
        return {name: share / sum(trained.values()) for name, share in trained.items()}

    @property
    def weights(self) -> dict[str, float | None]:
        """The weight of each term: with `balance` 1 for a trained one, whose share its gradient is scaled to."""
        terms = {"align": self.align, "image": self.image, "face": self.face}
        return {name: 1.0 if self.balance and value else value for name, value in terms.items()}


@dataclass
class OptimizerConfig:
    """AdamW, and the moving average of the adapter's weights that is saved.

    schedule: Schedule of the learning rate: constant, linear or cosine. linear and cosine reach 0 after `steps` steps.
    weight_decay: Weight decay of the adapter's parameters.
    ema: Decay of the moving average, with diffusers' warm-up: min(ema, (1 + i) / (10 + i)) at step i.
    """

    schedule: str = "constant"
    weight_decay: float = 1e-2
    ema: float = 0.996

    def __post_init__(self):
        one_of("optimizer.schedule", self.schedule, ["constant", "linear", "cosine"])
        between("optimizer.weight_decay", self.weight_decay, 0, 1)
        if not 0 <= self.ema < 1:
            raise FairDiffError(f"optimizer.ema: found {self.ema}, allowed: [0, 1)")


@dataclass
class ValidationConfig:
    """Validation of the averaged adapter during training. The best validation decides which adapter is saved.

    every: Number of steps between validations. null does none and saves the last averages.
    prompts: Number of validation prompts of each family; null takes all.
    images: Number of images generated for each validation prompt.
    floor: Smallest mean cosine to the reference images, over CLIP and the image encoder, with which a validation can become
    the best one. What is normal depends on the encoders: the paper's adapters keep .62 to .74 on photographs, those of
    Portraits .90 to .97.
    patience: Number of validations in a row without a new best after which training stops; null never stops early.
    """

    every: int | None = None
    prompts: int | None = 10
    images: int = 24
    floor: float = 0.5
    patience: int | None = 5

    def __post_init__(self):
        for key in ("every", "prompts", "images", "patience"):
            positive(f"validation.{key}", asdict(self)[key])
        between("validation.floor", self.floor, -1, 1)
