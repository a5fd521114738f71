"""Configuration of what is trained, on what, by which gradient and losses."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.config.laws import between, one_of, positive
from fairdiff.errors import FairDiffError

OWN_KEYS = {"soft_tokens": ("tokens", "initial_text"), "lora": ("parts", "rank")}  # of `adapter`, of one type alone


@dataclass
class AdapterConfig:
    """What is trained.

    type: soft_tokens, embeddings before the prompt, or lora.
    tokens: how many soft tokens.
    initial_text: the words that soft tokens start from, repeated to their number.
    parts: where LoRA learns, text_encoder, unet or both; text_encoder is every CLIP of the model, unet the transformer where
    the model has one in its place.
    rank: of LoRA, with alpha = rank.
    learning_rate: the rate of AdamW at the start of `optimizer.schedule`.
    path: what to start from, or to audit: the folder of a saved adapter of these settings, or a file of any tool, which is
    taken with its own layers, ranks or tokens; several in a list are added. scale: how much of what it learnt is applied; 0
    none (soft tokens: the initial words), 1 as saved, more exaggerates; a list has one for each path.
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
        """Of `path`, [] for none."""
        return self.path if isinstance(self.path, list) else [self.path] if self.path else []

    @property
    def scales(self) -> list[float]:
        """Of each path."""
        return self.scale if isinstance(self.scale, list) else [self.scale] * len(self.paths)


@dataclass
class PromptsConfig:
    """train, validation, test: a file each, as fairdiff/prompts.py reads it; null: the embedded set's `families`.

    template: the words around a subject, "a photo of {a} {}"; "{}" takes the lines of a file as whole prompts.
    families: how often one round of training visits each prompt of a family (an audit takes each prompt once).
    without_people: the share of training prompts that show no people. Their images are only to stay as they are. They come
    from the file, else from the embedded set; there are none where the image term has no weight.
    named: the share of training prompts that have a class in words (`phrases` of an attribute), "..., a woman". Their target
    is this class alone, so that the model still shows what a prompt names.
    per_step: prompts whose mean gradient makes one step, with `global_batch` images each (the paper: 1).
    negative: the text of the unconditional branch, in training, reference images and audit.
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
    """type: the weight of each sampler step's gradient, see `diffusion.solvers.gradient_weights`.

    unit: the paper's, the same for every step; reference: the published code's; solver: the solver's own.
    evaluations: replayed sampler steps K of T for each image, null for all.
    """

    type: str = "unit"
    evaluations: int | None = None

    def __post_init__(self):
        one_of("gradient.type", self.type, ["unit", "reference", "solver"])
        positive("gradient.evaluations", self.evaluations)


@dataclass
class LossConfig:
    """align, image, face: the weight of each term, or with `balance` its share of the gradient, relative to the others.

    0 measures a term without training on it; null leaves it out.
    balance: whether the terms' gradients are scaled to shares, step by step; false takes the weights as they are.
    confidence: the least confidence of a transport label that is trained on. class_weights: whether a label weighs by how
    rare its class shall be, see `Target.class_weights`; false is the paper's plain cross-entropy.
    confident_class: how sure the classifier must be of the reference image's class for its face to be kept as it is.
    originals: the share of a batch that is compared with reference images, in the image and face terms.
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
    """AdamW.

    schedule: of the learning rate, constant, linear or cosine; the latter two end at 0 after `steps` steps.
    weight_decay: AdamW's, of the adapter's parameters.
    ema: the decay of the averages after diffusers' warm-up, min(ema, (1 + i) / (10 + i)) at step i.
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
    """every: steps between validations of the averaged adapter, null for none; the best one is then what is saved.

    prompts: how many of each family (null: all). images: how many of each prompt.
    floor: the least mean cosine to the reference images over CLIP-I and the image encoder. What an image keeps depends
    on the encoders: the paper's adapters keep .62 to .74 of photographs, those of Portraits .90 to .97.
    patience: validations in a row without a new best after which training stops, null for never.
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
