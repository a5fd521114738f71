"""Build the networks that look at images (detector, classifiers, encoders, face embedder with bank), and hash them."""

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from classifiers.attributes import AttributeNet, load_attribute_net
from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage
from classifiers.embedders import load_embedder
from classifiers.hub import HubClassifier, load_hub_classifier
from classifiers.identity import Bank, load_bank
from classifiers.onnx_net import OnnxClassifier, load_onnx
from classifiers.types import Detector, Embedder
from classifiers.zeroshot import ZeroShotClassifier, load_zero_shot
from fairdiff import fingerprint
from fairdiff.builder.model import precisions
from fairdiff.config import Config, DetectorConfig, JudgeConfig
from fairdiff.errors import FairDiffError, blame
from fairdiff.objective.features import ClipEncoder, HubEncoder, ImageEncoder
from fairdiff.objective.perception import Perception
from fairdiff.plan import Plan
from fairdiff.portraits import weights

Judge = AttributeNet | HubClassifier | ZeroShotClassifier | OnnxClassifier


@dataclass
class Crop(DetectorConfig):
    """The face crop of a judge. align: whether five landmarks are aligned to ArcFace's template."""

    align: bool = False


def crop_of(config: Config, judge: JudgeConfig) -> Crop:
    """The detector's options with the crop that a judge sees: its own, or the detector's."""
    own = {key: value for key, value in (("crop_size", judge.crop_size), ("expand", judge.expand)) if value is not None}
    return Crop(**asdict(config.detector) | own, align=judge.align)


def detector_fingerprint(config: Config, detector: Detector, judge: JudgeConfig | None = None) -> str:
    """A hash of the detector and of a judge's crop: options and weights."""
    if isinstance(detector, InsightFaceDetector):
        weights_key = fingerprint.of_files(detector.files)
    else:
        weights_key = fingerprint.of_modules(detector) if isinstance(detector, MTCNNDetector) else None
    chosen = crop_of(config, judge) if judge else config.detector
    options = {key: value for key, value in asdict(chosen).items() if key not in ("root", "align")}
    options |= {"align": True} if judge and judge.align else {}  # the youngest, only where it is set: older hashes hold
    return fingerprint.of_values(options, weights_key)


def perception_fingerprint(config: Config, perception: Perception) -> str:
    """A hash of all networks that look at images in training."""
    parts = [fingerprint.of_frozen(perception.classifier), perception.classifier.config]
    for encoder in perception.encoders:
        parts += [fingerprint.of_frozen(encoder.model), encoder.config]
    if perception.embedder is not None:
        parts += [fingerprint.of_frozen(perception.embedder), perception.embedder.config]
    return fingerprint.of_values(parts, detector_fingerprint(config, perception.detector, config.judge))


def judge_fingerprint(judge: Judge, name: str) -> str:
    """A hash of everything that a judge's labels of one attribute depend on, whatever other attributes are requested."""
    classes = judge.attributes[name]
    match judge:
        case HubClassifier():
            net = judge.source[name]
            parts = [judge.config["nets"][net], judge.config["pixels"][net], judge.columns[name]]
            return fingerprint.of_values(fingerprint.of_frozen(judge.nets[net]), parts, classes)
        case ZeroShotClassifier():
            parts = [judge.config["pixels"], judge.config["prompts"][name]]
            return fingerprint.of_values(fingerprint.of_frozen(judge.model), parts, classes)
        case OnnxClassifier():
            graph = judge.graphs[judge.source[name]]
            return fingerprint.of_values(hashlib.sha256(graph.data).hexdigest(), graph.about, judge.columns[name], classes)
    return fingerprint.of_values(fingerprint.of_frozen(judge), judge.config, classes)


def embedder_fingerprint(embedder: Embedder) -> str:
    """A hash of a face embedder, as stored in the bank that it made."""
    return fingerprint.of_values(fingerprint.of_frozen(embedder), embedder.config)


def build_detector(config: Config) -> Detector:
    match config.detector.type:
        case "whole":
            return WholeImage()
        case "insightface":
            with blame("detector.root"):
                return InsightFaceDetector(Path(config.detector.root))
    return MTCNNDetector(input_size=config.detector.input_size).to(config.model.device)


def build_classifier(
    judge: JudgeConfig, key: str, embedded: str, classes: dict[str, tuple[str, ...]], device: str
) -> Judge:
    """A frozen classifier that knows every requested attribute with exactly the requested classes in their order."""
    match judge.type:
        case "hf":
            with blame(key, "."):
                classifier = load_hub_classifier(judge.path, judge.mapping, classes)
        case "open_clip":
            with blame(key, "."):
                classifier = load_zero_shot(judge.path, judge.mapping, classes)
        case "onnx":
            with blame(key, "."):
                classifier = load_onnx(judge.path, judge.mapping, judge.graph, classes)
        case _:
            with blame(f"{key}.path"):
                classifier = load_attribute_net(Path(judge.path) if judge.path else weights(embedded), classes)
    return classifier.to(device)


@lru_cache(maxsize=2)
def build_clip(path: str, device: str) -> ClipEncoder:
    """CLIP; training and audit share it, for photographs it holds gigabytes."""
    return ClipEncoder(weights("clip") if path == "embedded" else path, device)


@lru_cache(maxsize=2)
def build_encoder(path: str, device: str) -> ImageEncoder | HubEncoder:
    """The encoder in DINO's place, shared too."""
    return ImageEncoder(weights("encoder"), device) if path == "embedded" else HubEncoder(path, device)


def build_encoders(clip: str, encoder: str, device: str) -> tuple[ClipEncoder, ImageEncoder | HubEncoder]:
    return build_clip(clip, device), build_encoder(encoder, device)


def build_embedder(config: Config) -> Embedder:
    """The face embedder of `features.identity`, which there must be."""
    path = config.features.identity
    if path is None:
        raise FairDiffError(
            "features.identity: found null, allowed: a face embedder (a file of ArcFace or facenet-pytorch weights, a "
            "folder or a hub id) with features.bank=<its bank, made by scripts/build_bank.py>, or loss.face=null"
        )
    with blame("features.identity"):
        place = weights("identity") if path == "embedded" else path
        return load_embedder(place, config.detector.crop_size, config.detector.expand).to(config.model.device)


def bank_file(config: Config) -> Path:
    """The path of the bank of real faces: `features.bank`, else beside the embedder."""
    features = config.features
    if features.bank is not None:
        return Path(features.bank)
    place = weights("identity") if features.identity == "embedded" else Path(features.identity)
    folder = place if place.is_dir() else place.parent
    if not place.exists() or not (folder / "bank.safetensors").is_file():
        raise FairDiffError(
            f"features.bank: found null and no bank.safetensors beside {features.identity}, allowed: a bank of real faces, "
            "which scripts/build_bank.py makes of a folder of pictures, or loss.face=null"
        )
    return folder / "bank.safetensors"


def build_bank(config: Config, embedder: Embedder) -> Bank:
    file = bank_file(config)
    with blame("features.bank"):
        return load_bank(file, embedder.config["dim"], embedder_fingerprint(embedder)).to(config.model.device)


def build_perception(config: Config, plan: Plan) -> Perception:
    device, features = config.model.device, config.features
    embedder, bank = None, None
    if config.loss.face is not None:
        embedder = build_embedder(config)
        bank = build_bank(config, embedder)
    encoders = []
    if config.loss.image is not None:
        encoders = list(build_encoders(features.clip, features.encoder, device))
    classifier = build_classifier(config.judge, "judge", "judge", plan.attributes, device)
    crop = crop_of(config, config.judge)
    held, _ = precisions(config)
    dtype = torch.float32 if held == torch.float16 else held  # only the replay scales its gradients
    return Perception(
        build_detector(config), classifier, encoders, embedder, bank, crop.crop_size, crop.expand, dtype, crop.align
    )
