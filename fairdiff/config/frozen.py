"""Configuration of everything that training leaves unchanged: model, sampler, attributes, detector, judges, encoders."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.config.laws import between, one_of, positive, text
from fairdiff.errors import FairDiffError

SOLVERS = ["dpm", "ddim", "euler", "unipc", "euler_ancestral", "lcm", "flow_euler"]
MOST_STEPS = 999  # of a noise schedule of 1,000: with all of them multistep solvers divide by zero


@dataclass
class ModelConfig:
    """The diffusion model and its precision.

    path: A diffusers folder, a hub id, a hub id at a revision ("name@revision"), or a .safetensors file that holds a whole
    model. null is the embedded Portraits model.
    padding: How prompts are padded: "max_length" as diffusers' pipelines do, "longest" as the paper's released adapters
    need.
    clip_skip: Number of the text encoders' last layers that are skipped, counted as in diffusers; null skips none.
    device: Device of training and audit, such as cpu, cuda or cuda:1.
    dtype: Precision of the frozen U-Net and VAE, and of the matrix products in training's other frozen networks: auto,
    float32, bfloat16 or float16. "auto" takes what suits the device. float16, for GPUs without bfloat16, applies to the
    U-Net alone. Adapters, text encoders, latents, losses and the audit's networks are always float32.
    sampling_dtype: Precision in which a float32 U-Net and VAE compute where no gradient is taken: auto, float32 or
    bfloat16. "auto" takes bfloat16 on devices that have it. A run with "auto" may resume on another device.
    """

    path: str | None = None
    padding: str = "max_length"
    clip_skip: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    sampling_dtype: str = "auto"

    def __post_init__(self):
        one_of("model.padding", self.padding, ["max_length", "longest"])
        positive("model.clip_skip", self.clip_skip)
        one_of("model.dtype", self.dtype, ["auto", "float32", "bfloat16", "float16"])
        one_of("model.sampling_dtype", self.sampling_dtype, ["auto", "float32", "bfloat16"])


@dataclass
class SamplerConfig:
    """How images are sampled, in training and in the audit.

    scheduler: The solver: dpm (DPM-Solver++), ddim, euler or unipc; euler_ancestral or lcm, which add noise between steps;
    or flow_euler for flow-matching models. Each uses the model's own noise schedule.
    train_steps: Smallest and largest number of sampler steps in training. The number is drawn uniformly, and it is the same
    whenever a noise is used again.
    audit_steps: Number of sampler steps in the audit.
    guidance: Scale of classifier-free guidance, as in diffusers; 1 or less turns it off. A guidance-distilled model reads
    the scale as an input instead.
    final_sigmas: Noise level at which dpm and unipc end: "zero" or "sigma_min". Other solvers ignore it.
    spacing: How the time steps are spread over the schedule: "linspace", "leading" or "trailing". It overrides the model's
    folder. lcm ignores it, and flow_euler has no "leading".
    height, width: Height and width of the images in pixels, multiples of the VAE's factor (8, or 16 for flow-matching
    models). null is the model's own.
    """

    scheduler: str = MISSING
    final_sigmas: str = MISSING
    spacing: str = MISSING
    guidance: float = MISSING
    train_steps: list[int] = MISSING
    audit_steps: int = MISSING
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        one_of("sampler.scheduler", self.scheduler, SOLVERS)
        one_of("sampler.final_sigmas", self.final_sigmas, ["zero", "sigma_min"])
        one_of("sampler.spacing", self.spacing, ["linspace", "leading", "trailing"])
        between("sampler.audit_steps", self.audit_steps, 1, MOST_STEPS)
        between("sampler.guidance", self.guidance, 0, 100)
        if len(self.train_steps) != 2 or not 0 < self.train_steps[0] <= self.train_steps[1]:
            raise FairDiffError(
                f"sampler.train_steps: found {self.train_steps}, allowed: [low, high] with 0 < low <= high"
            )
        between("sampler.train_steps", self.train_steps[1], 1, MOST_STEPS)
        positive("sampler.height", self.height)
        positive("sampler.width", self.width)


@dataclass
class AttributeConfig:
    """One attribute of people. Its labels are perceived presentation.

    classes: Names of the classes, in the order of the attribute classifier's outputs.
    keep_outside: Factor on the image term of an image in which this attribute has to change, from 0 to 1 (appendix A.2 of
    the paper). A smaller one lets such images change more.
    keep_face: Further factor on the gradient of that image term inside the face box, from 0 to 1.
    phrases: Words for a person of each class, such as "a woman". Prompts that name a class are made with them
    (`prompts.named`, `audit.named`); without phrases there are no such prompts.
    """

    classes: list[Any] = MISSING  # list[str] would make "True" of an unquoted yes
    keep_outside: float = MISSING
    keep_face: float = MISSING
    phrases: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """The laws of the attribute of this name, which only the configuration that holds it knows."""
        key = f"attributes.{name}"
        text(f"{key}.classes", *self.classes)
        between(f"{key}.keep_outside", self.keep_outside, 0, 1)
        between(f"{key}.keep_face", self.keep_face, 0, 1)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise FairDiffError(f"{key}.classes: found {self.classes}, allowed: two or more different names")
        text(f"{key}.phrases", *self.phrases)
        words = self.phrases.values()
        if self.phrases and ({*self.phrases} != {*self.classes} or not all(isinstance(w, str) and w for w in words)):
            wanted = ", ".join(self.classes)
            raise FairDiffError(f"{key}.phrases: found {self.phrases}, allowed: words for each of {wanted}")


@dataclass
class DetectorConfig:
    """The face detector and the crop that attribute classifiers get.

    type: mtcnn, insightface, or whole, which takes the whole image as the face.
    input_size: Shorter side in pixels to which MTCNN resizes an image before it looks for faces. insightface always uses
    640.
    crop_size: Side of the square face crop in pixels, for classifiers that set no `crop_size` of their own.
    expand: Side of the square crop, as a multiple of the longer side of the face box.
    root: Folder of insightface's models. They are for non-commercial research and do not come with this project.
    """

    type: str = MISSING
    input_size: int = 64
    crop_size: int = 64
    expand: float = 1.6
    root: str | None = None

    def __post_init__(self):
        one_of("detector.type", self.type, ["mtcnn", "whole", "insightface"])
        for key in ("input_size", "crop_size", "expand"):
            positive(f"detector.{key}", asdict(self)[key])
        if self.type == "insightface" and self.root is None:
            raise FairDiffError("detector.root: found null, allowed: the folder of insightface's models")


@dataclass
class JudgeConfig:
    """A classifier of perceived presentation: `judge` for training, `audit.judge` for the audit.

    type: Format of the classifier: net (this project's own, classifiers/attributes.py), hf (Hugging Face), open_clip
    (zero-shot) or onnx. onnx has no gradient and is for audits only.
    path: A folder for net (null: the embedded classifier); a folder or hub id for hf; a folder or "architecture/pretrained
    tag" for open_clip; a file for onnx. hf and onnx also take one for each attribute: {gender: ..., race: ...}.
    mapping: For each attribute and class, what belongs to the class: labels of an hf classifier, column numbers of an onnx
    graph ("output:0" if it has several outputs), or prompts for open_clip.
    graph: Input and output format of an onnx classifier. It gets (scale x - mean) / std for pixels x in [0, 1], with
    `channels` rgb or bgr. `outputs` is logits or probabilities.
    crop_size: Side of this classifier's face crop in pixels; null takes `detector.crop_size`.
    expand: Side of this classifier's face crop, as a multiple of the longer side of the face box; null takes
    `detector.expand`.
    align: Whether faces are rotated and scaled so that five landmarks lie on ArcFace's template. The crop then has
    `crop_size` pixels and no `expand`.
    """

    type: str = "net"
    path: Any = None
    mapping: dict[str, Any] = field(default_factory=dict)
    crop_size: int | None = None
    expand: float | None = None
    align: bool = False
    graph: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        one_of("judge.type", self.type, ["net", "hf", "open_clip", "onnx"])
        if self.align and self.expand is not None:
            raise FairDiffError(f"judge.expand: found {self.expand} beside judge.align, which has its own; allowed: null")
        if self.graph and self.type != "onnx":
            raise FairDiffError(f"judge.graph: only onnx judges have it, judge.type is {self.type}")
        self._check_graph()
        positive("judge.crop_size", self.crop_size)
        positive("judge.expand", self.expand)
        each = isinstance(self.path, dict)
        if each and self.type not in ("hf", "onnx"):
            raise FairDiffError(f"judge.path: found {self.path}, allowed with judge.type={self.type}: one path")
        for path in self.path.values() if each else [self.path]:
            if not isinstance(path, str | None):
                raise FairDiffError(f"judge.path: found {path!r}, allowed: a path, a hub id, or one for each attribute")
        if self.mapping and self.type == "net":
            raise FairDiffError("judge.mapping: only hf, open_clip and onnx judges have it, judge.type is net")
        for name, classes in self.mapping.items():
            if not isinstance(classes, dict) or not all(isinstance(words, list) for words in classes.values()):
                raise FairDiffError(f"judge.mapping.{name}: found {classes}, allowed: class: [label or prompt, ...]")
            text(f"judge.mapping.{name}", *classes)
            for cls, words in classes.items():  # labels may be numbers
                names = words if self.type == "open_clip" else [word for word in words if type(word) is not int]
                text(f"judge.mapping.{name}.{cls}", *names)

    def _check_graph(self) -> None:
        for key, found in self.graph.items():
            one_of("judge.graph", key, ["scale", "mean", "std", "channels", "outputs"])
            if key in ("channels", "outputs"):
                one_of(f"judge.graph.{key}", found, {"channels": ["rgb", "bgr"], "outputs": ["logits", "probabilities"]}[key])
                continue
            numbers, wanted = ([found], 1) if key == "scale" else (found, 3)
            right = isinstance(numbers, list) and len(numbers) == wanted and all(type(n) in (int, float) for n in numbers)
            if not right or (key != "mean" and min(numbers) <= 0):
                more = "" if key == "mean" else " above 0"
                allowed = f"a number{more}" if key == "scale" else f"three numbers{more}"
                raise FairDiffError(f"judge.graph.{key}: found {found}, allowed: {allowed}")


@dataclass
class FeaturesConfig:
    """Encoders that compare images and faces with reference images. "embedded" names those of Portraits.

    clip: CLIP, as an open_clip folder or "architecture/pretrained tag".
    encoder: A second image encoder, DINO in the paper, as a folder or hub id of Hugging Face.
    identity: Face embedder of the face term: a file of ArcFace's or facenet-pytorch's weights, a folder or hub id of a
    Hugging Face image encoder, or a folder in this project's format. null is for runs with `loss.face=null`.
    bank: File of real faces' embeddings, made by scripts/build_bank.py for this embedder. null takes bank.safetensors
    beside the embedder.
    """

    clip: str = "embedded"
    encoder: str = "embedded"
    identity: str | None = "embedded"
    bank: str | None = None
