"""Build the parts of training from the settings and the plan: fingerprint, objective, trainee, schedule, validation."""

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

# Keys that do not change the result of training. steps: at a constant learning rate, more steps continue the same run.
NOT_TRAINING = (
    *("audit", "export", "hub", "resume", "cache", "micro_batch", "memory_gb", "steps"),
    *("images", "manifest", "plan", "tracker", "tracker_options"),
)
KEPT_OF_ADAPTER = 5  # copies of the adapter's size: gradients, their sum over prompts, two moments of AdamW, averages


def training_fingerprint(config: Config, plan: Plan, model: DiffusionModel, perception: Perception) -> str:
    """Return the fingerprint of a run: settings, weights, bank, prompts, targets and the initial adapter.

    It does not depend on the device, nor on the precision that "auto" chooses for it.
    """
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    kept["model"] = {k: v for k, v in kept["model"].items() if k != "device" and (k, v) != ("clip_skip", None)}
    kept["sampler"] = {k: v for k, v in kept["sampler"].items() if v is not None}  # without unset keys
    kept["judge"] = {k: v for k, v in kept["judge"].items() if v or k in ("path", "mapping")}  # likewise the judge's crop
    kept["features"] = {k: v for k, v in kept["features"].items() if k != "bank"}  # faces count, not the path
    if config.optimizer.schedule != "constant" or config.validation.every:  # a validation follows the last step
        kept["steps"] = config.steps
    texts = [[(p.text, p.family, p.people) for p in some] for some in (plan.train, plan.validation)]
    tables = [target.table.tolist() for target in plan.targets.known()]
    bank = None if perception.bank is None else fingerprint.of_named({"bank": perception.bank.embedding_ND})
    frozen = [model.fingerprint(precision=False), perception_fingerprint(config, perception)]
    return fingerprint.of_values(kept, frozen, bank, texts, tables, adapter_fingerprint(config))


def originals_fingerprint(config: Config, model: DiffusionModel, perception: Perception) -> str:
    """Return the fingerprint of everything that reference images and their features depend on.

    Call it before an adapter is attached to the model.
    """
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
    """Return how many images of a batch have a reference image."""
    return math.ceil(round(config.loss.originals * config.global_batch, 9))


def training_pieces(
    config: Config, model: DiffusionModel, adapter: Adapter, perception: Perception, images: int
) -> Pieces:
    """Return the micro-batch sizes of a step and apply them to the model; they are planned if `memory_gb` is given.

    images: number of images of a batch in this process.
    """

    def look(image_BCHW: torch.Tensor) -> None:
        pixels = image_BCHW.clone().requires_grad_()
        seen = perception.classify_faces(pixels, WholeImage()(pixels))  # the most faces possible
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
    block = config.global_batch  # images generated in other blocks differ by rounding
    folder = None
    if config.cache:
        folder = Path(config.cache) / "originals" / originals_fingerprint(config, model, perception)
    adapter = build_adapter(config, model)
    if config.adapter.path:  # the audit measures the loaded adapter separately, as "start"
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
