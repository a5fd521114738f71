"""Build a training from settings and plan: its identity, objective, trainee, schedule and validation."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from classifiers.detect import WholeImage
from fairdiff import fingerprint
from fairdiff.builder.adapter import adapter_fingerprint, build_adapter
from fairdiff.builder.judges import perception_fingerprint
from fairdiff.config import Config
from fairdiff.diffusion.adapters import Adapter
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.memory import Parts, Pieces, bytes_of, plan_pieces
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError
from fairdiff.objective.balance import Balance
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Perception
from fairdiff.plan import Plan
from fairdiff.training.originals import SCHEMA as ORIGINALS_SCHEMA
from fairdiff.training.originals import Originals
from fairdiff.training.step import Method, Objective, Trainee
from fairdiff.training.trackers import require_installed
from fairdiff.training.trainer import Schedule
from fairdiff.training.validation import Validation

# Keys that leave the result of training as it is. steps: of a constant rate they only ask for more of it.
NOT_TRAINING = (
    *("audit", "export", "hub", "resume", "cache", "micro_batch", "memory_gb", "steps"),
    *("images", "manifest", "plan", "tracker", "tracker_options"),
)
KEPT_OF_ADAPTER = 5  # times its own size: gradients, their sum over prompts, two moments of AdamW, averages


def training_fingerprint(config: Config, plan: Plan, model: DiffusionModel, perception: Perception) -> str:
    """A run's identity: all that changes the result of training, and neither the device nor the precision it suggests.

    Settings, weights, bank, prompts, targets, starting adapter.
    """
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    kept["model"] = {k: v for k, v in kept["model"].items() if k != "device" and (k, v) != ("clip_skip", None)}
    kept["sampler"] = {k: v for k, v in kept["sampler"].items() if v is not None}  # without height and width of its own
    kept["judge"] = {k: v for k, v in kept["judge"].items() if v or k in ("path", "mapping")}  # without a crop of its own
    kept["features"] = {k: v for k, v in kept["features"].items() if k != "bank"}  # its faces count, not its name
    if config.optimizer.schedule != "constant" or config.validation.every:  # the last step is always a validation
        kept["steps"] = config.steps
    texts = [[(p.text, p.family, p.people) for p in some] for some in (plan.train, plan.validation)]
    tables = [target.table.tolist() for target in plan.targets.known()]
    bank = None if perception.bank is None else fingerprint.of_named({"bank": perception.bank.embedding_ND})
    frozen = [model.fingerprint(precision=False), perception_fingerprint(config, perception)]
    return fingerprint.of_values(kept, frozen, bank, texts, tables, adapter_fingerprint(config))


def originals_fingerprint(config: Config, model: DiffusionModel, perception: Perception) -> str:
    """A hash of everything that reference images and their features depend on; compute it before an adapter is added."""
    guidance = model.effective_guidance(config.sampler.guidance)
    parts = [model.fingerprint(), perception_fingerprint(config, perception), config.seed, guidance]
    return fingerprint.of_values(ORIGINALS_SCHEMA, parts, config.global_batch, compared_images(config))


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
    """The number of images of a batch that are compared with reference images."""
    return math.ceil(round(config.loss.originals * config.global_batch, 9))


def training_pieces(
    config: Config, model: DiffusionModel, adapter: Adapter, perception: Perception, images: int
) -> Pieces:
    """The micro-batches of a step, planned if `memory_gb` is given, and set on the model. images: of a batch, here."""

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
    originals = Originals(
        perception, original, folder, block, compared, device=device, world=world, at_once=pieces.sample
    )
    balance = Balance(config.loss.shares) if config.loss.balance else None
    return Trainee(model, adapter, perception, originals, build_objective(config, plan), method, balance, world, pieces)


def build_schedule(config: Config, plan: Plan) -> Schedule:
    require_installed(config.tracker, config.tracker_options)
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
        tracker_options=config.tracker_options or {},
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
