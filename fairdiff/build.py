"""From configuration and plan to live objects, one build function a group. With build_audit.py it imports every room."""

import json
import math
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from classifiers.attributes import AttributeNet, load_attribute_net
from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage
from classifiers.hub import HubClassifier, load_hub_classifier
from classifiers.identity import Bank, load_bank, load_face_embedder
from classifiers.types import Detector
from classifiers.zeroshot import ZeroShotClassifier, load_zero_shot
from fairdiff import fingerprint
from fairdiff.config import Config, JudgeConfig
from fairdiff.diffusion.adapters import Adapter, Lora, SoftTokens, changes_images
from fairdiff.diffusion.load import DiffusionModel, check_device, fast_dtype, load_model
from fairdiff.diffusion.memory import Parts, Pieces, bytes_of, plan_pieces
from fairdiff.diffusion.sampling import initial_noise, make_solver, solver_coefficients
from fairdiff.errors import FairDiffError, blame
from fairdiff.files import read_given
from fairdiff.objective.balance import Balance
from fairdiff.objective.features import ClipEncoder, HubEncoder, ImageEncoder
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Perception
from fairdiff.plan import Plan
from fairdiff.portraits import weights
from fairdiff.training.originals import SCHEMA as ORIGINALS_SCHEMA
from fairdiff.training.originals import Originals
from fairdiff.training.step import Method, Objective, Trainee
from fairdiff.training.trainer import Schedule
from fairdiff.training.validation import Validation

# Keys that leave the result of training as it is. steps: of a constant rate they only ask for more of it.
NOT_TRAINING = ("audit", "resume", "cache", "micro_batch", "memory_gb", "steps")
KEPT_OF_ADAPTER = 5  # times its own size: gradients, their sum over prompts, two moments of AdamW, averages
Judge = AttributeNet | HubClassifier | ZeroShotClassifier


def training_fingerprint(config: Config, plan: Plan, model: DiffusionModel, perception: Perception) -> str:
    """A run's identity: all that changes the result of training, and neither the device nor the precision it suggests.

    Settings, weights, bank, prompts, targets, starting adapter.
    """
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    kept["model"] = {k: v for k, v in kept["model"].items() if k != "device"}
    if config.optimizer.schedule != "constant" or config.validation.every:  # the last step is always a validation
        kept["steps"] = config.steps
    texts = [[(p.text, p.family, p.people) for p in some] for some in (plan.train, plan.validation)]
    tables = [target.table.tolist() for target in plan.targets.known()]
    bank = None if perception.bank is None else fingerprint.of_named({"bank": perception.bank.embedding_ND})
    frozen = [model.fingerprint(precision=False), perception_fingerprint(config, perception)]
    return fingerprint.of_values(kept, frozen, bank, texts, tables, adapter_fingerprint(config))


def adapter_fingerprint(config: Config) -> str | None:
    """Of the tensors of `adapter.path`, whose file may be written again with another order of its header, and its scale."""
    if config.adapter.path is None:
        return None
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(config.adapter.path).glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise FairDiffError(f"adapter.path: {file}: cannot read the adapter: {error}") from error
    return fingerprint.of_values(fingerprint.of_named(tensors), config.adapter.scale)


def detector_fingerprint(config: Config, detector: Detector) -> str:
    """Of what finds faces: its options and its weights."""
    if isinstance(detector, InsightFaceDetector):
        weights_key = fingerprint.of_files(detector.files)
    else:
        weights_key = fingerprint.of_modules(detector) if isinstance(detector, MTCNNDetector) else None
    options = {key: value for key, value in asdict(config.detector).items() if key != "root"}
    return fingerprint.of_values(options, weights_key)


def perception_fingerprint(config: Config, perception: Perception) -> str:
    """Of everything that looks at images in training."""
    parts = [fingerprint.of_frozen(perception.classifier), perception.classifier.config]
    for encoder in perception.encoders:
        parts += [fingerprint.of_frozen(encoder.model), encoder.config]
    if perception.embedder is not None:
        parts += [fingerprint.of_frozen(perception.embedder), perception.embedder.config]
    return fingerprint.of_values(parts, detector_fingerprint(config, perception.detector))


def originals_fingerprint(config: Config, model: DiffusionModel, perception: Perception) -> str:
    """Of everything that makes a reference image and what is measured on it; taken before an adapter is hung."""
    parts = [model.fingerprint(), perception_fingerprint(config, perception), config.seed, config.sampler.guidance]
    return fingerprint.of_values(ORIGINALS_SCHEMA, parts, config.global_batch, compared_images(config))


def precisions(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """(dtype, sampling_dtype) with "auto" resolved for the device."""
    device, held, sampled = config.model.device, config.model.dtype, config.model.sampling_dtype
    held = fast_dtype(device) if held == "auto" else held
    if sampled == "auto":
        sampled = fast_dtype(device) if held == "float32" else held
        sampled = "float32" if (held, sampled) == ("float32", "float16") else sampled  # its VAE would overflow
    if held not in ("float32", sampled):
        raise FairDiffError(
            f"model.sampling_dtype: found {sampled}, but model.dtype is {held} here; allowed: auto, or float32 for both"
        )
    return getattr(torch, held), getattr(torch, sampled)


def build_model(config: Config) -> DiffusionModel:
    check_device(config.model.device)
    held, sampled = precisions(config)
    path = config.model.path or weights("model")
    model = load_model(path, config.model.padding, config.model.device)
    options = config.sampler
    try:
        solver = make_solver(options.scheduler, model.scheduler.config, options.final_sigmas, options.spacing)
        for steps in {*options.train_steps, options.audit_steps}:
            solver_coefficients(solver, steps)
    except FairDiffError as error:
        raise FairDiffError(f"model.path: {path}, with the settings of sampler: {error}") from error
    model.scheduler = solver
    model.negative = config.prompts.negative
    model.sampling_dtype = sampled
    _ = model.weights_fingerprint  # taken as loaded, in float32, so that a run's identity is the same on every device
    model.lower_precision(held)
    return model


def build_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    if options.type == "soft_tokens":
        adapter = SoftTokens(model, options.tokens, options.initial_text)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        adapter = Lora(model, options.parts, options.rank, options.rank, generator)
    if options.path:
        try:
            adapter.load(Path(options.path))
        except FairDiffError as error:
            made = read_about(Path(options.path)).get("options")
            hint = f"; it was made with {made}" if made else ""
            raise FairDiffError(f"adapter.path: {error}{hint}") from error
        adapter.rescale(options.scale)
    return adapter


def build_saved_adapter(config: Config, plan: Plan, model: DiffusionModel) -> Adapter:
    """The adapter of `adapter.path` to audit, which must change images where its scale is not 0."""
    adapter = build_adapter(config, model)
    if config.adapter.scale and not changes_images(model, adapter, plan.audit[0].text, config.sampler.guidance):
        raise FairDiffError(
            f"adapter.path: {config.adapter.path}: changes nothing in the images; allowed: a trained one"
        )
    return adapter


def read_about(adapter: Path) -> dict:
    """adapter.json beside the weights of a saved adapter, {} if there is none."""
    path = adapter / "adapter.json"
    try:
        about = json.loads(read_given(path, f"adapter.path: {path}")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"adapter.path: {path}: is not JSON") from error
    if not isinstance(about, dict):
        raise FairDiffError(f"adapter.path: {path}: found {type(about).__name__}, allowed: a table")
    return about


def adapter_options(config: Config) -> dict[str, object]:
    """The keys of `adapter` that its kind has."""
    own = {"soft_tokens": ("type", "tokens", "initial_text"), "lora": ("type", "parts", "rank")}
    kept = (*own[config.adapter.type], "learning_rate", *(("path", "scale") if config.adapter.path else ()))
    return {key: value for key, value in asdict(config.adapter).items() if key in kept}


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
        case _:
            with blame(f"{key}.path"):
                classifier = load_attribute_net(Path(judge.path) if judge.path else weights(embedded), classes)
    return classifier.to(device)


@lru_cache(maxsize=2)
def build_encoders(clip: str, encoder: str, device: str) -> tuple[ClipEncoder, ImageEncoder | HubEncoder]:
    """CLIP and the encoder in DINO's place; training and audit share them, for photographs they hold gigabytes."""
    return (
        ClipEncoder(weights("clip") if clip == "embedded" else clip, device),
        ImageEncoder(weights("encoder"), device) if encoder == "embedded" else HubEncoder(encoder, device),
    )


def build_perception(config: Config, plan: Plan) -> Perception:
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
            bank: Bank = load_bank(folder / "bank.safetensors", embedder.config["dim"]).to(device)
    encoders = []
    if config.loss.image is not None:
        encoders = list(build_encoders(features.clip, features.encoder, device))
    classifier = build_classifier(config.judge, "judge", "judge", plan.attributes, device)
    crop = config.detector
    held, _ = precisions(config)
    dtype = torch.float32 if held == torch.float16 else held  # only the replay scales its gradients
    return Perception(build_detector(config), classifier, encoders, embedder, bank, crop.crop_size, crop.expand, dtype)


def build_objective(config: Config, plan: Plan) -> Objective:
    loss = config.loss
    return Objective(
        target=plan.targets,
        damping={name: Damping(a.keep_outside, a.keep_face) for name, a in config.attributes.items()},
        confidence=loss.confidence,
        weigh_classes=loss.class_weights,
        confident_class=loss.confident_class,
        **loss.weights,
    )


def compared_images(config: Config) -> int:
    """How many images of a batch have a reference image to be compared with."""
    return math.ceil(round(config.loss.originals * config.global_batch, 9))


def training_pieces(config: Config, model: DiffusionModel, adapter: Adapter, perception: Perception) -> Pieces:
    """What a step does at once, planned where `memory_gb` is given, and applied to the model."""

    def look(image_BCHW: torch.Tensor) -> None:
        pixels = image_BCHW.clone().requires_grad_()
        seen = perception.classify_faces(pixels, WholeImage()(pixels))  # as many faces as there can be
        answers = [*seen.logits.values(), *perception.features(pixels)]
        answers += [] if perception.embedder is None else [perception.embed(seen.faces.aligned_FCHW)]
        if torch.is_grad_enabled():
            torch.autograd.grad(sum(answer.sum() for answer in answers), pixels)

    pieces = Pieces.of(config.micro_batch)
    if config.memory_gb is not None:
        looking = [perception.classifier, perception.embedder, perception.detector]
        looking += [encoder.model for encoder in perception.encoders]
        held = bytes_of(module for module in looking if isinstance(module, torch.nn.Module))
        held += KEPT_OF_ADAPTER * sum(p.nbytes for p in adapter.parameters())
        parts = Parts(model, look, config.global_batch, config.sampler.train_steps[1])
        pieces = plan_pieces(parts, config.memory_gb, held)
    pieces.apply(model)
    return pieces


def build_trainee(config: Config, plan: Plan, model: DiffusionModel, perception: Perception) -> Trainee:
    block = config.global_batch  # images made together agree with those made otherwise to rounding only
    folder = None
    if config.cache:
        folder = Path(config.cache) / "originals" / originals_fingerprint(config, model, perception)
    adapter = build_adapter(config, model)
    if config.adapter.path:  # what it did before this training is not this training's
        adapter.origin = [p.detach().clone() for p in adapter.parameters()]
    pieces = training_pieces(config, model, adapter, perception)

    def original(prompt: str, indices: list[int], steps: int) -> torch.Tensor:
        noise = initial_noise(prompt, config.seed, indices, model.latent_shape).to(model.unet.device)
        with adapter.off():
            return model.generator(config.sampler.guidance, steps)(prompt, noise)

    method = Method(
        guidance=config.sampler.guidance,
        gradient=config.gradient.type,
        evaluations=config.gradient.evaluations,
        decode_batch=pieces.decode,
        replay_batch=pieces.replay,
    )
    compared, device = compared_images(config), config.model.device
    originals = Originals(perception, original, folder, block, compared, device=device, at_once=pieces.sample)
    balance = Balance(config.loss.shares) if config.loss.balance else None
    return Trainee(model, adapter, perception, originals, build_objective(config, plan), method, balance, pieces)


def build_schedule(config: Config, plan: Plan) -> Schedule:
    return Schedule(
        steps=config.steps,
        batch=config.global_batch,
        noise_pool=config.noise_pool,
        sampler_steps=tuple(config.sampler.train_steps),
        learning_rate=config.adapter.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        ema=config.optimizer.ema,
        decay=config.optimizer.schedule,
        seed=config.seed,
        prompts=config.prompts.per_step,
        validation=build_validation(config, plan),
    )


def build_validation(config: Config, plan: Plan) -> Validation | None:
    options = config.validation
    if options.every is None:
        return None
    return Validation(
        every=options.every,
        prompts=list(plan.validation),
        images=options.images,
        sampler_steps=config.sampler.audit_steps,
        floor=options.floor,
        patience=options.patience,
    )
