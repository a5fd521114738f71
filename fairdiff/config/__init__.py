"""All configuration schemas and the rules between their keys. A broken rule raises a FairDiffError of one line."""

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
    """Settings of the audit. The group `judge@audit.judge` chooses its attribute classifier.

    split: Which prompts are audited: "test", or "validation" for choosing settings.
    prompts: Number of prompts of each family; null audits all.
    images_per_prompt: Number of images generated for each of these prompts.
    without_people: Number of audited prompts that show no people, whose images should not change. Each gets 16 images, or
    `images_per_prompt` if that is less.
    named: Number of prompts that are repeated with each class in words ("..., a woman"), to count the faces that show the
    named class. Each gets 16 images, or `images_per_prompt` if that is less. The words are the attributes' `phrases`; null
    for none.
    guidance: Further guidance scales, each from 0 to 100, at which the same prompts are audited. The report draws bias over
    the scale, because bias can grow with it.
    seed: Seed of the audit's noise and of the resampling behind its intervals.
    equivalence: Margin of the verdict, from .001 to 1. An attribute is "on target" if the whole interval of its distance D
    lies below the margin.
    drift: Margin for untargeted attributes, from .001 to 1. Their bias and class shares count as unchanged if the intervals
    of all changes lie within plus or minus this value.
    calibration: File of the audit judge's error counts, written by scripts/calibrate.py. null uses calibration.json in the
    judge's folder if there is one. "none" corrects nothing, and the report says so in red.
    fail_above: Makes the command a gate. It replaces `equivalence` as the margin, and the command exits with code 3 unless
    every attribute with a target is "on target". null exits with 0 whatever the verdict.
    faces: What happens to an image with several faces: "largest" classifies the largest one, "refuse" counts the image as
    one without a face.
    clip: CLIP that measures CLIP-T and CLIP-I, in the format of `features.clip`. null takes `features.clip` itself, which
    training optimises; another one is independent of training.
    encoder: Image encoder that measures drift and variety, in the format of `features.encoder`; null takes
    `features.encoder`.
    keep_images: Whether every audited image is saved as a PNG. `images` can then audit them again with another judge.
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
    """The whole configuration. fairdiff/run.py describes the run folder and how a run resumes.

    steps: Number of optimizer steps.
    global_batch: Number of images generated for each prompt in one step, over all processes.
    noise_pool: Number of noises that training uses for each prompt, rounded down to a multiple of `global_batch`. Their
    reference images are cached, so a small pool saves time when a prompt is met again.
    micro_batch: Number of images decoded at once. The replay takes twice as many (image, step) pairs at once, and sampling
    takes three times as many images. It changes the memory and the time, not the result.
    memory_gb: Memory of the device in GB, such as 12, 16, 24, 40 or 80. The batch sizes are then planned from it, and
    `micro_batch` is ignored. null uses `micro_batch`.
    seed: Seed of all random numbers in training.
    resume: true continues an interrupted run when its command is repeated; false starts over.
    export: Further formats in which the trained adapter is saved: kohya, merged or merged_file for LoRA, a1111 for soft
    tokens. scripts/export.py describes them.
    hub: Repository on the Hugging Face hub ("you/name"). The adapter, its model card, audit.json and the report are
    uploaded there after the audit, if `audit.fail_above` lets them pass. null uploads nothing.
    cache: Folder for what is measured on the frozen model's images, shared by all runs; null for none.
    images: Folder of existing images to audit, or a list of two, [before, after]. No diffusion model is loaded then; null
    audits a model.
    manifest: CSV that says which prompt each file of `images` shows. null reads manifest.csv in the folder; without that
    file each sub-folder is named by its prompt.
    plan: Whether scripts/audit.py only prints how many images and prompts its target, margin and judge need.
    tracker: Experiment tracker beside metrics.jsonl: tensorboard, wandb or trackio; null for none.
    tracker_options: Arguments for wandb.init, trackio.init or tensorboard's SummaryWriter, such as {project: faces, name:
    first,
    group: a, tags: [b]}. Arguments by which a run resumes are not allowed; null for none.

    target: Shares of each attribute's classes, which sum to 1. Its key `file` names a table of shares instead, in a format
    of fairdiff/objective/target_files.py; "labour" is the one that comes with the embedded prompts.
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
        """FairDiffError for judges that do not work with the detector or in training."""
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
        """FairDiffError for settings of generation together with given pictures."""
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
