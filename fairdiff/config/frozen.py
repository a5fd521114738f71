"""Configuration of what stays as it is: model, sampler, attributes, detector, judges, encoders."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from fairdiff.config.laws import between, one_of, positive, text
from fairdiff.errors import FairDiffError

SOLVERS = ["dpm", "ddim", "euler", "unipc", "euler_ancestral", "lcm", "flow_euler"]
MOST_STEPS = 999  # of a noise schedule of 1,000: with all of them multistep solvers divide by zero


@dataclass
class ModelConfig:
    """path: null for the embedded Portraits model, else a diffusers folder, a hub id, one at a revision ("name@revision"), or
    a .safetensors file with a whole model.

    padding: "max_length" pads prompts as pipelines do, "longest" as the released adapters were trained.
    clip_skip: how many of the text encoders' last layers prompts leave out, as in diffusers' pipelines; null for none.
    dtype: of the frozen U-Net and VAE, and what training's frozen networks multiply in; adapters, text encoder, latents,
    losses and the audit's networks are float32 whatever it says. float16, for GPUs without bfloat16, is of the U-Net alone.
    device: where training and audit compute, cpu, cuda or cuda:1.
    sampling_dtype: what U-Net and VAE of float32 multiply in where no gradient is taken. "auto": what suits the device, see
    `diffusion.load.fast_dtype`; a run's identity holds the word, not what it became.
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
    """How the model draws.

    scheduler: dpm (DPM-Solver++), ddim, euler or unipc, or with noise added between steps euler_ancestral or lcm;
    flow_euler of flow-matching models. All are on the model's own noise schedule.
    train_steps: the least and the most steps of the sampler in training, evenly drawn; the same when a noise is met again.
    audit_steps: steps of the sampler in the audit.
    guidance: the scale of classifier-free guidance, 1 or less for none, as diffusers' pipelines take it; a model distilled
    from a guided one reads it instead.
    final_sigmas: where dpm and unipc end, "zero" or "sigma_min"; others end where they do.
    spacing: how T steps are spread over the schedule, "linspace", "leading" or "trailing", whatever the model's folder says;
    lcm has its own, flow_euler no "leading".
    height, width: of the images in pixels, multiples of the VAE's factor (8, or 16 of flow models); null for the model's own.
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
    """One attribute of people; its labels are perceived presentation.

    classes: their names in the order of the judge's outputs.
    keep_outside: by what the image term of an image is multiplied in which this attribute shall change (the paper, A.2).
    keep_face: by what its gradient is multiplied again inside the face's box.
    phrases: class -> words for a person of it, "a woman", for prompts that name a class (`prompts.named`, `audit.named`);
    empty: there are no such prompts.
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
    """What finds faces.

    type: mtcnn, insightface, or whole, which takes the whole image as the face.
    input_size: to which mtcnn resizes the shorter side of the image, in pixels; insightface has its own, 640.
    crop_size: side of what judges without a crop of their own see, in pixels.
    expand: the side of the square that is cropped, in sides of the face's box.
    root: the folder of insightface's models, which are for non-commercial research and do not come with this project.
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
    """A classifier of perceived presentation.

    type: net is a classifier of this project (classifiers/attributes.py), hf one of Hugging Face, open_clip zero-shot, onnx
    an ONNX graph, for audits only, as it has no gradient.
    path: of net a folder, null for the embedded one; of hf a folder or hub id; of open_clip a folder or
    "architecture/pretrained tag"; of onnx a file. hf and onnx may have one for each attribute, {gender: ..., race: ...}.
    mapping: attribute -> class -> the model's labels (hf), its columns' numbers (onnx; "output:0" of several outputs), or
    prompts (open_clip), that together are this class.
    graph: how an onnx judge wants its pixels, (scale x - mean) / std of x in [0, 1], channels rgb or bgr, and whether its
    outputs are logits or probabilities.
    crop_size, expand: of what this judge sees, as in `detector`; null for those there.
    align: it sees faces turned and scaled so that five landmarks lie on ArcFace's template, at crop_size.
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
    """What compares images and faces; "embedded" is for Portraits.

    clip: an open_clip folder or "architecture/pretrained tag". encoder: a folder or hub id of a Hugging Face image
    encoder, in DINO's place.
    identity: a face embedder: a file of ArcFace's or facenet-pytorch's weights, a folder or hub id of a Hugging Face image
    encoder, or a folder of one's own; null if there is none.
    bank: the file of its real faces, as scripts/build_bank.py makes it; null for the bank.safetensors beside the embedder.
    """

    clip: str = "embedded"
    encoder: str = "embedded"
    identity: str | None = "embedded"
    bank: str | None = None
