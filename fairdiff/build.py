"""From configuration and plan to live objects, one build function a group. With build_audit.py it imports every room."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from classifiers.attributes import AttributeNet, load_attribute_net
from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage
from classifiers.embedders import load_embedder
from classifiers.hub import HubClassifier, load_hub_classifier
from classifiers.identity import Bank, load_bank
from classifiers.types import Detector, Embedder
from classifiers.zeroshot import ZeroShotClassifier, load_zero_shot
from fairdiff import fingerprint
from fairdiff.config import Config, JudgeConfig, SamplerConfig
from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, read_about
from fairdiff.diffusion.adapters import Adapter, Lora, SoftTokens, changes_images
from fairdiff.diffusion.denoise import guided
from fairdiff.diffusion.imports import FILES, file_of, import_lora, import_soft_tokens
from fairdiff.diffusion.load import DiffusionModel, check_device, fast_dtype, load_model, solver_of
from fairdiff.diffusion.memory import Parts, Pieces, bytes_of, plan_pieces
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.solvers import solver_coefficients
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError, blame
from fairdiff.objective.balance import Balance
from fairdiff.objective.features import ClipEncoder, HubEncoder, ImageEncoder
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Perception
from fairdiff.plan import Plan
from fairdiff.portraits import weights
from fairdiff.training.originals import SCHEMA as ORIGINALS_SCHEMA
from fairdiff.training.originals import Originals
from fairdiff.training.step import Method, Objective, Trainee
from fairdiff.training.trackers import require_installed
from fairdiff.training.trainer import Schedule
from fairdiff.training.validation import Validation

# Keys that leave the result of training as it is. steps: of a constant rate they only ask for more of it.
NOT_TRAINING = (
    *("audit", "export", "resume", "cache", "micro_batch", "memory_gb", "tracker", "steps"),
    *("images", "manifest"),
)
KEPT_OF_ADAPTER = 5  # times its own size: gradients, their sum over prompts, two moments of AdamW, averages
Judge = AttributeNet | HubClassifier | ZeroShotClassifier


def training_fingerprint(config: Config, plan: Plan, model: DiffusionModel, perception: Perception) -> str:
    """A run's identity: all that changes the result of training, and neither the device nor the precision it suggests.

    Settings, weights, bank, prompts, targets, starting adapter.
    """
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    kept["model"] = {k: v for k, v in kept["model"].items() if k != "device" and (k, v) != ("clip_skip", None)}
    kept["sampler"] = {k: v for k, v in kept["sampler"].items() if v is not None}  # without height and width of its own
    kept["features"] = {k: v for k, v in kept["features"].items() if k != "bank"}  # its faces count, not its name
    if config.optimizer.schedule != "constant" or config.validation.every:  # the last step is always a validation
        kept["steps"] = config.steps
    texts = [[(p.text, p.family, p.people) for p in some] for some in (plan.train, plan.validation)]
    tables = [target.table.tolist() for target in plan.targets.known()]
    bank = None if perception.bank is None else fingerprint.of_named({"bank": perception.bank.embedding_ND})
    frozen = [model.fingerprint(precision=False), perception_fingerprint(config, perception)]
    return fingerprint.of_values(kept, frozen, bank, texts, tables, adapter_fingerprint(config))


def adapter_fingerprint(config: Config) -> str | None:
    """Of the tensors of `adapter.path`, whose file may be written again with another order of its header, and its scale.

    Of files that are taken as they are all of them counts: what stands beside the tensors says their alphas.
    """
    options = config.adapter
    if options.path is None:
        return None
    if imported(config):
        name = SOFT_TOKENS_FILE if options.type == "soft_tokens" else LORA_FILE
        files = [file_of(Path(path), name) for path in options.paths]
        if missing := [file for file in files if not file.is_file()]:
            raise FairDiffError(f"adapter.path: {missing[0]}: no such file")
        return fingerprint.of_values(fingerprint.of_files(files), options.scales)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(options.path).glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise FairDiffError(f"adapter.path: {file}: cannot read the adapter: {error}") from error
    return fingerprint.of_values(fingerprint.of_named(tensors), options.scale)


@contextmanager
def _of_path() -> Iterator[None]:
    """Say of an error that it is about `adapter.path`."""
    try:
        yield
    except FairDiffError as error:
        raise FairDiffError(f"adapter.path: {error}") from error


def imported(config: Config) -> bool:
    """Whether `adapter.path` names files, taken as they are, or several, and not the one folder of a saved adapter."""
    return isinstance(config.adapter.path, list) or Path(config.adapter.path or "").suffix in FILES


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


def judge_fingerprint(judge: Judge, name: str) -> str:
    """Of what a judge's answers for one attribute depend on; other attributes requested beside it change nothing."""
    classes = judge.attributes[name]
    match judge:
        case HubClassifier():
            net = judge.source[name]
            parts = [judge.config["nets"][net], judge.config["pixels"][net], judge.columns[name]]
            return fingerprint.of_values(fingerprint.of_frozen(judge.nets[net]), parts, classes)
        case ZeroShotClassifier():
            parts = [judge.config["pixels"], judge.config["prompts"][name]]
            return fingerprint.of_values(fingerprint.of_frozen(judge.model), parts, classes)
    return fingerprint.of_values(fingerprint.of_frozen(judge), judge.config, classes)


def embedder_fingerprint(embedder: Embedder) -> str:
    """Of a face embedder, as a bank says who made it."""
    return fingerprint.of_values(fingerprint.of_frozen(embedder), embedder.config)


def originals_fingerprint(config: Config, model: DiffusionModel, perception: Perception) -> str:
    """Of everything that makes a reference image and what is measured on it; taken before an adapter is hung."""
    guidance = model.effective_guidance(config.sampler.guidance)
    parts = [model.fingerprint(), perception_fingerprint(config, perception), config.seed, guidance]
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


def model_path(config: Config) -> str | Path:
    """The folder or hub id of the model."""
    return config.model.path or weights("model")


def build_model(config: Config) -> DiffusionModel:
    check_device(config.model.device)
    held, sampled = precisions(config)
    path = model_path(config)
    model = load_model(path, config.model.padding, config.model.device)
    options = config.sampler
    model.size = image_size(options, model)
    try:
        solver = solver_of(model, options.scheduler, options.final_sigmas, options.spacing)
        for steps in {*options.train_steps, options.audit_steps}:
            solver_coefficients(solver, steps)
    except FairDiffError as error:
        raise FairDiffError(f"model.path: {path}, with the settings of sampler: {error}") from error
    scales = [options.guidance, *config.audit.guidance]
    if config.prompts.negative and not any(guided(model.unet, scale) for scale in scales):
        raise FairDiffError(
            f"prompts.negative: found '{config.prompts.negative}', which nothing reads without classifier-free guidance "
            f"(sampler.guidance={options.guidance:g}); allowed here: ''"
        )
    model.scheduler = solver
    model.clip_skip = clip_skip(config.model.clip_skip, model)
    model.negative = config.prompts.negative
    model.sampling_dtype = sampled
    _ = model.weights_fingerprint  # taken as loaded, in float32, so that a run's identity is the same on every device
    model.lower_precision(held)
    return model


def image_size(options: SamplerConfig, model: DiffusionModel) -> tuple[int, int] | None:
    """Requested (height, width) in pixels, None where they are the model's own."""
    own = model.image_size
    for key, pixels in (("height", options.height), ("width", options.width)):
        if pixels and pixels % model.multiple:
            near = max(round(pixels / model.multiple), 1) * model.multiple
            raise FairDiffError(
                f"sampler.{key}: found {pixels}, allowed with this model: multiples of {model.multiple}, such as {near}"
            )
    size = options.height or own[0], options.width or own[1]
    return None if size == own else size


def clip_skip(skip: int | None, model: DiffusionModel) -> int:
    """How many layers prompts leave out; one at least must be left."""
    if skip is None:
        return 0
    if model.kind is FluxPipeline:
        raise FairDiffError(f"model.clip_skip: found {skip}, allowed with FLUX, which reads no words of CLIP: null")
    clips = [encoder for encoder in model.text_encoders if encoder is not model.t5]
    most = min(clip.config.num_hidden_layers for clip in clips) - len(clips)  # two leave one layer out anyway
    if skip > most:
        raise FairDiffError(f"model.clip_skip: found {skip}, allowed with this model: 1 to {most}, or null")
    return skip


def build_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    if imported(config):
        return _import_adapter(config, model)
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
        adapter.rescale(options.scales[0])
    return adapter


def _import_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    paths = [Path(path) for path in options.paths]
    with _of_path():
        if options.type == "soft_tokens":
            return import_soft_tokens(model, paths, options.scales, options.initial_text)
        return import_lora(model, paths, options.scales)


def build_saved_adapter(config: Config, plan: Plan, model: DiffusionModel) -> Adapter:
    """The adapter of `adapter.path` to audit, which must change images where its scale is not 0."""
    adapter = build_adapter(config, model)
    if any(config.adapter.scales) and not changes_images(model, adapter, plan.audit[0].text, config.sampler.guidance):
        raise FairDiffError(
            f"adapter.path: {config.adapter.path}: changes nothing in the images; allowed: a trained one"
        )
    return adapter


def adapter_options(config: Config) -> dict[str, object]:
    """The keys of `adapter` that its kind has; what is imported has the layers, ranks and tokens of its files."""
    own = {"soft_tokens": ("type", "tokens", "initial_text"), "lora": ("type", "parts", "rank")}
    own |= {"soft_tokens": ("type", "initial_text"), "lora": ("type",)} if imported(config) else {}
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
    """Where the bank of real faces lies: `features.bank`, else beside the embedder."""
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


def training_pieces(config: Config, model: DiffusionModel, adapter: Adapter, perception: Perception, images: int) -> Pieces:
    """What a step does at once, planned where `memory_gb` is given, and applied to the model. images: of a batch, here."""

    def look(image_BCHW: torch.Tensor) -> None:
        pixels = image_BCHW.clone().requires_grad_()
        seen = perception.classify_faces(pixels, WholeImage()(pixels))  # as many faces as there can be
        answers = [*seen.logits.values(), *perception.features(pixels)]
        answers += [] if perception.embedder is None else [perception.embed(perception.align(seen))]
        if torch.is_grad_enabled():
            torch.autograd.grad(sum(answer.sum() for answer in answers), pixels)

    pieces = Pieces.of(config.micro_batch)
    if config.memory_gb is not None:
        looking = [perception.classifier, perception.embedder, perception.detector]
        looking += [encoder.model for encoder in perception.encoders]
        held = bytes_of(module for module in looking if isinstance(module, torch.nn.Module))
        held += KEPT_OF_ADAPTER * sum(p.nbytes for p in adapter.parameters())
        parts = Parts(model, look, images, config.sampler.train_steps[1])
        pieces = plan_pieces(parts, config.memory_gb, held)
    pieces.apply(model)
    return pieces


def build_trainee(
    config: Config, plan: Plan, model: DiffusionModel, perception: Perception, world: World = ALONE
) -> Trainee:
    if config.global_batch < world.size:
        raise FairDiffError(
            f"global_batch: found {config.global_batch} for {world.size} processes, allowed: an image or more for each"
        )
    block = config.global_batch  # images made together agree with those made otherwise to rounding only
    folder = None
    if config.cache:
        folder = Path(config.cache) / "originals" / originals_fingerprint(config, model, perception)
    adapter = build_adapter(config, model)
    if config.adapter.path:  # what it did before this training is not this training's
        adapter.origin = [p.detach().clone() for p in adapter.parameters()]
    pieces = training_pieces(config, model, adapter, perception, math.ceil(config.global_batch / world.size))

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
    originals = Originals(perception, original, folder, block, compared, device=device, world=world, at_once=pieces.sample)
    balance = Balance(config.loss.shares) if config.loss.balance else None
    return Trainee(model, adapter, perception, originals, build_objective(config, plan), method, balance, world, pieces)


def build_schedule(config: Config, plan: Plan) -> Schedule:
    require_installed(config.tracker)
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
        tracker=config.tracker,
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
