"""From configuration to live objects, one build function a group; with its audit half the only modules that import all."""

import hashlib
import json
import math
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

from classifiers.attributes import AttributeNet, load_attribute_net
from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage
from classifiers.hub import HubClassifier, load_hub_classifier
from classifiers.identity import Bank, load_bank, load_face_embedder
from classifiers.types import Detector
from classifiers.zeroshot import ZeroShotClassifier, load_zero_shot
from fairdiff import plan as asked
from fairdiff.config import Config, JudgeConfig
from fairdiff.diffusion.adapters import Adapter, Lora, SoftTokens
from fairdiff.diffusion.load import DiffusionModel, digest, fingerprint, load_model
from fairdiff.diffusion.sampling import initial_noise, make_solver
from fairdiff.errors import FairDiffError, blame
from fairdiff.objective.balance import Balance
from fairdiff.objective.features import ClipEncoder, HubEncoder, ImageEncoder
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Judges
from fairdiff.objective.targets import Targets
from fairdiff.portraits import weights
from fairdiff.prompts import Prompt
from fairdiff.training.originals import Originals
from fairdiff.training.step import Method, Objective, Trainee
from fairdiff.training.trainer import Schedule
from fairdiff.training.validation import Validation

# Keys that leave the result of training as it is, or only ask for more of it.
NOT_TRAINING = ("audit", "resume", "cache", "checkpoint_every", "steps", "decode_batch", "replay_batch")
Judge = AttributeNet | HubClassifier | ZeroShotClassifier


def training_fingerprint(config: Config, model: DiffusionModel, judges: Judges, prompts: list[Prompt]) -> str:
    """A short hash of all that changes the result of training: keys, weights, bank, prompts, targets, starting adapter."""
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    # how many steps there are changes them: the learning rate of each, and the last is always a validation
    if config.optimizer.schedule != "constant" or config.validation.every:
        kept["steps"] = config.steps
    watched = asked.validated(config)
    texts = [[p.text if p.people else (p.text, p.family) for p in some] for some in (prompts, watched)]
    tables = [target.table.tolist() for target in asked.targets(config, prompts + watched).known()]
    bank = None if judges.bank is None else judges.bank.embedding_ND.tolist()
    return digest(kept, frozen_key(config, model, judges), bank, texts, tables, adapter_fingerprint(config))


def adapter_fingerprint(config: Config) -> str | None:
    """A short hash of the files of `adapter.path` and of its scale."""
    if config.adapter.path is None:
        return None
    files = sorted(Path(config.adapter.path).glob("*.safetensors"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files], config.adapter.scale)


def build_model(config: Config) -> DiffusionModel:
    check_device(config.model.device)
    model = load_model(config.model.path or weights("model"), config.model.padding, config.model.device)
    model.scheduler = make_solver(config.sampler.scheduler, model.scheduler.config, config.sampler.final_sigmas)
    model.decode_batch = config.decode_batch
    model.negative = config.prompts.negative
    model.lower_precision(getattr(torch, config.model.dtype))
    model.sampling_dtype = getattr(torch, config.model.sampling_dtype)
    return model


def check_device(name: str) -> None:
    """FairDiffError for a device that this machine has not."""
    allowed = ["cpu"]
    if torch.cuda.is_available():
        allowed += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in allowed:
        raise FairDiffError(f"model.device: found {name}, but this machine has none; allowed: {', '.join(allowed)}")


def build_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    if options.type == "soft_tokens":
        adapter = SoftTokens(model, options.tokens, options.initial_text)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        adapter = Lora(model, options.parts, options.rank, options.alpha, generator)
    if options.path:
        try:
            adapter.load(Path(options.path))
        except FairDiffError as error:
            made = read_about(Path(options.path)).get("options")
            hint = f"; it was made with {made}" if made else ""
            raise FairDiffError(f"adapter.path: {error}{hint}") from error
        adapter.rescale(options.scale)
    return adapter


def read_about(adapter: Path) -> dict:
    """adapter.json beside the weights of a saved adapter, {} if there is none."""
    path = adapter / "adapter.json"
    try:
        about = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise FairDiffError(f"adapter.path: {path}: is not JSON") from error
    return about if isinstance(about, dict) else {}


def adapter_options(config: Config) -> dict[str, object]:
    """The keys of `adapter` that its kind has."""
    own = {"soft_tokens": ("type", "tokens", "initial_text"), "lora": ("type", "parts", "rank", "alpha")}
    kept = (*own[config.adapter.type], "learning_rate", *(("path", "scale") if config.adapter.path else ()))
    return {key: value for key, value in asdict(config.adapter).items() if key in kept}


def build_detector(config: Config) -> Detector:
    match config.detector.type:
        case "whole":
            return WholeImage()
        case "insightface":
            with blame("detector.root"):
                return InsightFaceDetector(Path(config.detector.root), input_size=config.detector.input_size)
    return MTCNNDetector(input_size=config.detector.input_size).to(config.model.device)


def eyes_key(config: Config, detector: Detector) -> str:
    """A short hash of what finds faces: its options and its weights."""
    if isinstance(detector, InsightFaceDetector):
        weights_key = digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in detector.files])
    else:
        weights_key = fingerprint(detector) if isinstance(detector, MTCNNDetector) else None
    options = {key: value for key, value in asdict(config.detector).items() if key != "root"}
    return digest(options, weights_key)


def build_classifier(judge: JudgeConfig, key: str, embedded: str, config: Config) -> Judge:
    """A frozen judge that knows every asked attribute with exactly the asked classes in the asked order."""
    classes = {name: tuple(attribute.classes) for name, attribute in config.attributes.items()}
    match judge.type:
        case "hf":
            with blame(key, "."):
                classifier = load_hub_classifier(judge.path, judge.paths, judge.mapping, classes)
        case "open_clip":
            with blame(key, "."):
                classifier = load_zero_shot(judge.path, judge.mapping, classes)
        case _:
            with blame(f"{key}.path"):
                classifier = load_attribute_net(Path(judge.path) if judge.path else weights(embedded), classes)
    return classifier.to(config.model.device)


@lru_cache(maxsize=2)
def build_encoders(clip: str, encoder: str, device: str) -> tuple[ClipEncoder, ImageEncoder | HubEncoder]:
    """CLIP and the encoder in DINO's place; training and audit share them, for photographs they hold gigabytes."""
    return (
        ClipEncoder(weights("clip") if clip == "embedded" else clip, device),
        ImageEncoder(weights("encoder"), device) if encoder == "embedded" else HubEncoder(encoder, device),
    )


def build_judges(config: Config) -> Judges:
    device, features = config.model.device, config.features
    embedder, bank = None, None
    if config.loss.face is not None:
        if features.identity is None:
            raise FairDiffError(
                "features.identity: found null, allowed: a folder with a face embedder and its bank.safetensors, "
                "or loss.face=null"
            )
        folder = weights("identity") if features.identity == "embedded" else Path(features.identity)
        with blame("features.identity"):
            embedder = load_face_embedder(folder).to(device)
            bank: Bank = load_bank(folder / "bank.safetensors").to(device)
    encoders = []
    if config.loss.image is not None:
        encoders = list(build_encoders(features.clip, features.encoder, device))
    classifier = build_classifier(config.judge, "judge", "judge", config)
    crop, dtype = config.detector, getattr(torch, config.model.dtype)
    return Judges(build_detector(config), classifier, encoders, embedder, bank, crop.crop_size, crop.expand, dtype)


def build_objective(config: Config, targets: Targets) -> Objective:
    damping = {name: Damping(a.keep_outside, a.keep_face) for name, a in config.attributes.items()}
    loss = config.loss
    return Objective(
        target=targets,
        damping=damping,
        confidence=loss.confidence,
        draws=loss.draws,
        weigh_classes=loss.class_weights,
        align=loss.align,
        image=loss.image,
        face=loss.face,
        confident_class=loss.confident_class,
    )


def frozen_key(config: Config, model: DiffusionModel, judges: Judges) -> str:
    """A short hash of everything that makes an original and what is measured on it; taken before an adapter is hung."""
    parts = [model.fingerprint(), fingerprint(judges.classifier), judges.classifier.config]
    for encoder in judges.encoders:
        parts += [fingerprint(encoder.model), encoder.config]
    if judges.embedder is not None:
        parts += [fingerprint(judges.embedder), judges.embedder.config]
    return digest(parts, config.seed, config.sampler.guidance, eyes_key(config, judges.detector))


def compared_pictures(config: Config) -> int:
    """How many pictures of a batch have an original to be compared with."""
    return math.ceil(round(config.loss.originals * config.global_batch, 9))


def own_pictures(config: Config) -> int:
    """Of how many pictures the model's own shares of a prompt are taken, for `target.relaxation`."""
    return min(config.noise_pool, 48)


def build_trainee(config: Config, model: DiffusionModel, judges: Judges) -> Trainee:
    block = config.global_batch  # pictures made together agree with those made otherwise to rounding only
    compared = compared_pictures(config)
    folder = None
    if config.cache:
        folder = Path(config.cache) / "originals" / digest(frozen_key(config, model, judges), block, compared)
    adapter = build_adapter(config, model)
    if config.adapter.path:  # what it did before this training is not this training's
        adapter.origin = [p.detach().clone() for p in adapter.parameters()]

    def original(prompt: str, indices: list[int], steps: int) -> torch.Tensor:
        noise = initial_noise(prompt, config.seed, indices, model.latent_shape).to(model.unet.device)
        with adapter.off():
            return model.generator(config.sampler.guidance, steps)(prompt, noise)

    gradient = config.gradient
    method = Method(
        config.sampler.guidance, gradient.type, gradient.evaluations, gradient.detach, config.decode_batch,
        config.replay_batch, gradient.last,
    )  # fmt: skip
    originals = Originals(judges, original, folder, block, compared, device=config.model.device)

    @cache
    def own(prompt: str) -> np.ndarray | None:
        steps = sum(config.sampler.train_steps) // 2
        return originals.shares(prompt, own_pictures(config), steps, tuple(config.attributes))

    watched = asked.validated(config)
    targets = asked.targets(config, asked.prompts(config, "train") + watched)
    targets = replace(targets, relaxation=float(config.target["relaxation"]), own=own)
    balance = Balance(config.loss.shares) if config.loss.shares else None
    return Trainee(model, adapter, judges, originals, build_objective(config, targets), method, balance)


def build_schedule(config: Config) -> Schedule:
    low, high = config.sampler.train_steps
    optimizer = config.optimizer
    return Schedule(
        config.steps, config.global_batch, config.noise_pool, (low, high), config.adapter.learning_rate,
        optimizer.weight_decay, optimizer.max_grad_norm, optimizer.ema, config.checkpoint_every, config.seed,
        config.prompts.per_step, optimizer.schedule, optimizer.warmup, build_validation(config),
    )  # fmt: skip


def build_validation(config: Config) -> Validation | None:
    options = config.validation
    if options.every is None:
        return None
    return Validation(
        options.every, asked.validated(config), options.images,
        options.sampler_steps or config.sampler.audit_steps, options.floor, options.patience,
    )  # fmt: skip
