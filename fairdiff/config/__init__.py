"""Every configuration schema with its cross-field laws. What they forbid is a FairDiffError of one line."""

from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
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
from fairdiff.config.laws import between, finite, leaves, no_empty_path, one_of, positive, text
from fairdiff.config.training import (
    AdapterConfig,
    GradientConfig,
    LossConfig,
    OptimizerConfig,
    PromptsConfig,
    ValidationConfig,
)
from fairdiff.errors import FairDiffError

PATHS = (
    *("model.path", "adapter.path", "judge.path", "audit.judge.path", "prompts.train", "prompts.validation"),
    *(
        "audit.calibration",
        "audit.clip",
        "audit.encoder",
        "prompts.test",
        "target.file",
        "detector.root",
        "features.clip",
        "features.encoder",
        "features.identity",
        "features.bank",
        "cache",
        "images",
        "manifest",
    ),
)
EXPORTS = {"lora": ["kohya", "merged", "merged_file"], "soft_tokens": ["a1111"]}  # adapter/ is diffusers' own


@dataclass
class AuditConfig:
    """split: which prompts are audited, "test" or, to choose settings by, "validation". judge: apart from training's.

    calibration: the file in which scripts/calibrate.py counted that judge's errors; null for the calibration.json in its
    folder, if there is one; none to correct nothing, which the report says in red.

    prompts: how many of each family (null: all). images_per_prompt: images of each.
    without_people: how many prompts without people, which must not change, with 16 images or fewer each.
    named: how many prompts are audited with each class in words too (`phrases` of an attribute), whose images are to show it,
    with as many images; null for none.
    guidance: further guidance scales at which the same prompts are audited, for a chart; bias can grow with the scale.
    seed: of the noise and the resampling. equivalence: the distance D below which the whole interval must lie for
    "on target".
    drift: the change of an untargeted attribute's bias and shares that still counts as none.
    fail_above: such a D, in the place of `equivalence`; the command exits with code 3 unless every attribute with a target is
    "on target". null: it exits with 0 whatever it finds.
    faces: of a picture with several, "largest": that counts, "refuse": the picture counts as one without a face.
    clip, encoder: what measures CLIP-T, CLIP-I and drift, as in `features`; null for those there, which training optimises.
    keep_images: whether every audited image is kept as a PNG, for `images` and another judge later.
    """

    split: str = "test"
    prompts: int | None = None
    images_per_prompt: int = 60
    without_people: int = 6
    named: int | None = 6
    guidance: list[float] = field(default_factory=list)
    seed: int = 20231113
    equivalence: float = 0.10
    drift: float = 0.06
    calibration: str | None = None
    fail_above: float | None = None
    keep_images: bool = False
    faces: str = "largest"
    clip: str | None = None
    encoder: str | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        one_of("audit.split", self.split, ["test", "validation"])
        one_of("audit.faces", self.faces, ["largest", "refuse"])
        for key in ("prompts", "images_per_prompt", "without_people", "named"):
            positive(f"audit.{key}", asdict(self)[key])
        for scale in self.guidance:
            between("audit.guidance", scale, 0, 100)
        between("audit.seed", self.seed, 0, 2**31 - 1)
        between("audit.equivalence", self.equivalence, 0.001, 1)
        between("audit.drift", self.drift, 0.001, 1)
        if self.fail_above is not None:
            between("audit.fail_above", self.fail_above, 0.001, 1)
            if self.equivalence not in (AuditConfig.equivalence, self.fail_above):
                raise FairDiffError(
                    f"audit.fail_above: found {self.fail_above} beside audit.equivalence={self.equivalence}, allowed: one of "
                    "them"
                )

    @property
    def margin(self) -> float:
        """The distance D below which the whole interval must lie."""
        return self.equivalence if self.fail_above is None else self.fail_above


@dataclass
class Config:
    """The whole configuration. What lies in a run folder, and what resumes there: fairdiff/run.py.

    steps: updates of the adapter. global_batch: images of each prompt in one of them. noise_pool: noises of each prompt
    in training, used in whole slices of global_batch; their reference images are cached.
    micro_batch: images decoded at once. Replay takes twice as many (image, step) pairs, and three times as many images are
    sampled at once. It sets the memory and not the result.
    memory_gb: what the device has, 12, 16, 24, 40 or 80; then this chooses what `micro_batch` does. null: `micro_batch`.
    seed: of everything random in training. resume: the same command goes on where it stopped, false starts over.
    export: formats for other tools in which the trained adapter is written too: kohya, merged, merged_file of LoRA, a1111 of
    soft tokens; see scripts/export.py.
    hub: you/name on the Hugging Face hub, where the adapter, its model card, audit.json and report are uploaded after the
    audit, if `audit.fail_above` lets it pass; null for nowhere. See scripts/push.py.
    cache: a folder for what the frozen model generated and measured, null for none.
    images: a folder of pictures, or two, [before, after], to audit in the place of a model; see `fairdiff/pictures.py`.
    manifest: a CSV that says which prompt each picture of `images` shows; null: manifest.csv in the folder, and without one
    each sub-folder is named by its prompt.
    plan: scripts/audit.py only prints how many images of how many prompts its target, margin and judge take.
    tracker: tensorboard, wandb or trackio, beside metrics.jsonl; null for none.
    tracker_options: a table of what the tracker is started with, such as {project: faces, name: first, group: a, tags: [b]}:
    arguments of wandb.init, trackio.init or tensorboard's SummaryWriter, but for those by which a run goes on; null for none.

    target: attribute -> class -> share; the shares of an attribute sum to 1. file: a table of shares, as
    fairdiff/objective/target_files.py reads it, or the name of one that the embedded prompt set has ("labour").
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = MISSING
    adapter: AdapterConfig = MISSING
    attributes: dict[str, AttributeConfig] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=lambda: {"file": None})
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    detector: DetectorConfig = MISSING
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    loss: LossConfig = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    steps: int = MISSING
    global_batch: int = MISSING
    noise_pool: int = 480
    micro_batch: int = 24
    memory_gb: float | None = None
    seed: int = 0
    resume: bool = True
    export: list[str] = field(default_factory=list)
    hub: str | None = None
    cache: str | None = "outputs/cache"
    images: Any = None
    manifest: str | None = None
    plan: bool = False
    tracker: str | None = None
    tracker_options: Any = None

    def __post_init__(self):
        for key, found in leaves(asdict(self)):
            finite(key, found)
            if key.startswith(PATHS):  # judge.path has one for each attribute, or one for all
                no_empty_path(key, found)
        for key in ("steps", "global_batch", "noise_pool", "micro_batch", "memory_gb"):
            positive(key, asdict(self)[key])
        between("seed", self.seed, 0, 2**31 - 1)
        for kind in self.export:
            one_of("export", kind, EXPORTS[self.adapter.type])
        if self.tracker is not None:
            one_of("tracker", self.tracker, ["tensorboard", "wandb", "trackio"])
        if self.tracker_options is not None and not isinstance(self.tracker_options, dict):
            raise FairDiffError(f"tracker_options: found {self.tracker_options}, allowed: a table, or null")
        if self.tracker_options and self.tracker is None:
            raise FairDiffError(f"tracker_options: found {next(iter(self.tracker_options))} without a tracker, allowed: null")
        if self.noise_pool < self.global_batch:
            raise FairDiffError(
                f"noise_pool: found {self.noise_pool}, allowed: at least global_batch = {self.global_batch}"
            )
        every = self.validation.every
        if every is not None and every > self.steps:
            raise FairDiffError(f"validation.every: found {every}, allowed: at most steps = {self.steps}, or null")
        if every is not None and self.loss.image is None:
            raise FairDiffError("validation.every: needs the encoders of loss.image, which is null; 0 measures only")
        most, evaluations = self.sampler.train_steps[1], self.gradient.evaluations
        if evaluations is not None and evaluations > most:
            raise FairDiffError(
                f"gradient.evaluations: found {evaluations}, allowed: at most sampler.train_steps, {most}, or null for all"
            )
        self._check_images()
        if not self.attributes:
            raise FairDiffError("attribute: found [], allowed: one or more of gender, race, age or your own")
        for name, attribute in self.attributes.items():
            attribute.check(name)
        self._check_judges()
        _check_target(self.attributes, self.target)
        _check_mapping("judge.mapping", self.judge.mapping, self.attributes)
        _check_mapping("audit.judge.mapping", self.audit.judge.mapping, self.attributes)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Attributes and their classes."""
        return {name: tuple(attribute.classes) for name, attribute in self.attributes.items()}

    def _check_judges(self) -> None:
        """What judges need of the detector, and of training."""
        if self.judge.type == "onnx":
            raise FairDiffError(
                "judge.type: found onnx, which has no gradient, allowed in training: net, hf, open_clip; audits take it: "
                "judge@audit.judge=onnx"
            )
        if self.detector.type == "whole":
            for key, judge in (("judge", self.judge), ("audit.judge", self.audit.judge)):
                if judge.align:
                    raise FairDiffError(f"{key}.align: found true, allowed with detector=whole, without landmarks: false")
            if self.audit.faces == "refuse":
                raise FairDiffError("audit.faces: found refuse, allowed with detector=whole, which counts no faces: largest")

    def _check_images(self) -> None:
        """Where pictures are given nothing is generated."""
        folders = self.images if isinstance(self.images, list) else [self.images or ""]
        if not all(isinstance(folder, str) for folder in folders) or (isinstance(self.images, list) and len(folders) != 2):
            raise FairDiffError(f"images: found {self.images}, allowed: a folder, two folders [before, after], or null")
        if self.images is None:
            if self.manifest is not None:
                raise FairDiffError(f"manifest: found {self.manifest} without images, allowed: with images=<folder>")
            return
        generated = {"adapter.path": self.adapter.path, "audit.guidance": self.audit.guidance or None}
        generated["audit.keep_images"] = self.audit.keep_images or None
        for key, found in generated.items():
            if found is not None:
                raise FairDiffError(f"{key}: found {found} beside images, which nothing generates; allowed: one of them")


def _check_mapping(key: str, mapping: dict[str, Any], attributes: dict[str, AttributeConfig]) -> None:
    """FairDiffError for a misspelt attribute: one that is not requested may stand there, and nothing reads it."""
    for name in mapping:
        near = get_close_matches(name, attributes, 1, 0.8)
        if near and name not in attributes:
            raise FairDiffError(f"{key}: found {name}, allowed: {near[0]}")


def _check_target(attributes: dict[str, AttributeConfig], target: dict[str, Any]) -> None:
    for name in target:
        one_of("target", name, [*attributes, "file"])
    if "file" not in target:
        raise FairDiffError("target.file: no value given, allowed: a path, a name such as labour, or null")
    if "file" in attributes:
        raise FairDiffError("attributes: found the name file, allowed: any other")
    if not isinstance(target["file"], str | None):
        raise FairDiffError(f"target.file: found {target['file']}, allowed: a path, or a name such as labour")
    for name, attribute in attributes.items():
        shares = target.get(name)
        if not isinstance(shares, dict):
            raise FairDiffError(
                f"target.{name}: found {shares}, allowed: a share for each of {', '.join(attribute.classes)}"
            )
        text(f"target.{name}", *shares)
        for cls, share in shares.items():
            one_of(f"target.{name}", cls, attribute.classes)
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not (share == 0 or 1e-6 <= share <= 1):  # the reciprocals of much smaller ones overflow
                raise FairDiffError(f"target.{name}.{cls}: found {share}, allowed: 0, or a number in [1e-06, 1]")
        missing = [c for c in attribute.classes if c not in shares]
        if missing:
            raise FairDiffError(f"target.{name}: no share for {', '.join(missing)}")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise FairDiffError(f"target.{name}: shares sum to {sum(shares.values()):.6g}, allowed: 1")
