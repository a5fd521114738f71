"""From configuration to live objects, one build function a group; the only module that imports everything."""

import hashlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from classifiers.attributes import AttributeNet, load_attribute_net
from classifiers.detect import InsightFaceDetector, MTCNNDetector, WholeImage
from classifiers.identity import Bank, load_bank, load_face_embedder
from classifiers.types import Detector
from fairdiff.adapters import Adapter, Lora, SoftTokens
from fairdiff.audit.axis import MetricSpec, software_versions
from fairdiff.audit.generate import AuditPlan
from fairdiff.audit.measure import Measurer
from fairdiff.config import Config
from fairdiff.errors import FairDiffError
from fairdiff.features import ClipEncoder, ImageEncoder
from fairdiff.judges import Judges
from fairdiff.losses import Damping
from fairdiff.models import DiffusionModel, digest, fingerprint, load_model
from fairdiff.originals import Originals
from fairdiff.portraits import weights, world
from fairdiff.prompts import Prompt, fill, read_prompts
from fairdiff.sampling import initial_noise, make_solver
from fairdiff.step import Method, Objective, Trainee
from fairdiff.targets import Target
from fairdiff.trainer import Schedule

# Keys that leave the result of training as it is, or only ask for more of it.
NOT_TRAINING = ("audit", "resume", "cache", "checkpoint_every", "steps", "decode_batch", "replay_batch")


@contextmanager
def blame(key: str):
    """Turn a library's ValueError or OSError into one line that names the configuration key."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise FairDiffError(f"{key}: {' '.join(str(error).split())}") from error


def training_fingerprint(config: Config, model: DiffusionModel, judges: Judges, prompts: list[Prompt]) -> str:
    """A short hash of all that changes the result of training: keys, weights, prompts and a starting adapter."""
    kept = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINING}
    return digest(kept, frozen_key(config, model, judges), [p.text for p in prompts], adapter_fingerprint(config))


def adapter_fingerprint(config: Config) -> str | None:
    """A short hash of the files of `adapter.path`."""
    if config.adapter.path is None:
        return None
    files = sorted(Path(config.adapter.path).glob("*.safetensors"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def build_model(config: Config) -> DiffusionModel:
    if config.model.device != "cpu" and not torch.cuda.is_available():
        raise FairDiffError(f"model.device: found {config.model.device}, but this machine has none; allowed: cpu")
    model = load_model(config.model.path or weights("model"), config.model.padding, config.model.device)
    model.scheduler = make_solver(config.sampler.scheduler, model.scheduler.config, config.sampler.final_sigmas)
    model.decode_batch = config.decode_batch
    model.lower_precision(getattr(torch, config.model.dtype))
    return model


def build_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    if options.type == "soft_tokens":
        adapter = SoftTokens(model, options.tokens, options.initial_text)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        adapter = Lora(model, options.parts, options.rank, options.alpha, generator)
    if options.path:
        adapter.load(Path(options.path))
    return adapter


def build_detector(config: Config) -> Detector:
    match config.detector.type:
        case "whole":
            return WholeImage()
        case "insightface":
            with blame("detector.root"):
                return InsightFaceDetector(Path(config.detector.root), input_size=config.detector.input_size)
    return MTCNNDetector(input_size=config.detector.input_size).to(config.model.device)


def build_classifier(path: str | None, key: str, embedded: str, config: Config) -> AttributeNet:
    """A frozen judge that knows every asked attribute with exactly the asked classes in the asked order."""
    asked = {name: tuple(attribute.classes) for name, attribute in config.attributes.items()}
    with blame(key):
        classifier = load_attribute_net(Path(path) if path else weights(embedded), asked)
    return classifier.to(config.model.device)


def build_judges(config: Config) -> Judges:
    device = config.model.device
    embedder, bank = None, None
    if config.loss.face is not None:
        with blame("loss.face"):
            embedder = load_face_embedder(weights("identity")).to(device)
            bank: Bank = load_bank(weights("identity") / "bank.safetensors").to(device)
    encoders = []
    if config.loss.image is not None:
        encoders = [ClipEncoder(weights("clip"), device), ImageEncoder(weights("encoder"), device)]
    classifier = build_classifier(config.judge.path, "judge.path", "judge", config)
    crop = config.detector
    return Judges(build_detector(config), classifier, encoders, embedder, bank, crop.crop_size, crop.expand)


def build_target(config: Config) -> Target:
    marginals = {n: [float(config.target[n][c]) for c in a.classes] for n, a in config.attributes.items()}
    with blame("target"):
        return Target.from_marginals(marginals)


def build_objective(config: Config) -> Objective:
    damping = {name: Damping(a.keep_outside, a.keep_face) for name, a in config.attributes.items()}
    loss = config.loss
    return Objective(
        build_target(config), damping, loss.confidence, loss.draws, loss.align, loss.image, loss.face,
        loss.confident_class,
    )  # fmt: skip


def frozen_key(config: Config, model: DiffusionModel, judges: Judges) -> str:
    """A short hash of everything that makes an original and what is measured on it; taken before an adapter is hung."""
    parts = [model.fingerprint(), fingerprint(judges.classifier), judges.classifier.config]
    for encoder in judges.encoders:
        parts += [fingerprint(encoder.model), encoder.size]
    if judges.embedder is not None:
        parts += [fingerprint(judges.embedder), judges.embedder.config]
    return digest(parts, config.seed, config.sampler.guidance, asdict(config.detector))


def build_trainee(config: Config, model: DiffusionModel, judges: Judges) -> Trainee:
    folder = Path(config.cache) / "originals" / frozen_key(config, model, judges) if config.cache else None
    adapter = build_adapter(config, model)

    def original(prompt: str, indices: list[int], steps: int) -> torch.Tensor:
        noise = initial_noise(prompt, config.seed, indices, model.latent_shape).to(model.unet.device)
        with adapter.off():
            return model.generator(config.sampler.guidance, steps)(prompt, noise)

    gradient = config.gradient
    method = Method(
        config.sampler.guidance, gradient.type, gradient.evaluations, gradient.detach, config.decode_batch,
        config.replay_batch,
    )  # fmt: skip
    originals = Originals(judges, original, folder, block=config.global_batch, device=config.model.device)
    return Trainee(model, adapter, judges, originals, build_objective(config), method)


def build_schedule(config: Config) -> Schedule:
    low, high = config.sampler.train_steps
    optimizer = config.optimizer
    return Schedule(
        config.steps, config.global_batch, config.noise_pool, (low, high), config.adapter.learning_rate,
        optimizer.weight_decay, optimizer.max_grad_norm, optimizer.ema, config.checkpoint_every, config.seed,
    )  # fmt: skip


def build_prompts(config: Config, which: str) -> list[Prompt]:
    """Training or test prompts in a fixed shuffle: the user's file, or the embedded world's occupations."""
    path = {"train": config.prompts.train, "test": config.prompts.test}[which]
    limit = {"train": config.prompts.train_limit, "test": config.audit.prompts}[which]
    prompts = read_prompts(path, config.prompts.template) if path else world.prompts("occupation", which)
    if not path and config.prompts.template != world.TEMPLATES["occupation"]:
        prompts = [Prompt(fill(config.prompts.template, p.subject), p.family, p.subject) for p in prompts]
    prompts = sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).hexdigest())
    return prompts[:limit]


def build_unrelated(config: Config) -> list[Prompt]:
    """Prompts without people, which an adapter must leave as they are."""
    return world.prompts("object", "all")[: config.audit.unrelated_prompts]


@dataclass(frozen=True)
class Audit:
    """An audit ready to run: what is painted, who looks at it, and what is counted."""

    plan: AuditPlan
    measurer: Measurer
    spec: MetricSpec

    @property
    def fingerprint(self) -> str:
        """A short hash of what is painted, who looks and what is asked of the counts."""
        plan, spec = self.plan, self.spec
        texts = [p.text for p in (*plan.prompts, *plan.unrelated)]
        sizes = [plan.images_per_prompt, plan.unrelated_images, plan.seed, spec.delta]
        return digest(plan.hashes, texts, sizes, {k: v.tolist() for k, v in spec.targets.items()})


def build_audit(config: Config, model: DiffusionModel, after: str | None, training_judge: AttributeNet | None) -> Audit:
    """The audit of a model, with a judge of its own (`audit.judge`) and both encoders.

    after: a hash of the adapter's making. Build the audit before an adapter is hung on the model, so that the hashes
    are those of the frozen weights.
    """
    device = config.model.device
    judge = build_classifier(config.audit.judge.path, "audit.judge.path", "audit_judge", config)
    clip, encoder = ClipEncoder(weights("clip"), device), ImageEncoder(weights("encoder"), device)
    attributes = {name: judge.attributes[name] for name in judge.attributes}
    detector = build_detector(config)
    crop = config.detector
    same = training_judge is not None and fingerprint(judge) == fingerprint(training_judge)
    frozen = digest(model.fingerprint(), config.sampler.guidance, config.sampler.audit_steps)
    looking = [fingerprint(judge), judge.config, fingerprint(clip.model), fingerprint(encoder.model), encoder.size]
    plan = AuditPlan(
        prompts=build_prompts(config, "test"),
        unrelated=build_unrelated(config),
        attributes=attributes,
        images_per_prompt=config.audit.images_per_prompt,
        unrelated_images=config.audit.unrelated_images,
        batch_size=config.audit.batch_size,
        seed=config.audit.seed,
        latent_shape=model.latent_shape,
        hashes={
            "before": frozen,
            "after": digest(frozen, after, config.steps),
            "judge": digest(looking, asdict(crop)),
        },
    )
    spec = MetricSpec(
        attributes=attributes,
        judge={"path": config.audit.judge.path or "embedded audit judge", "same_as_training_judge": same},
        targets={name: build_target(config).marginal(name) for name in config.attributes},
        delta=config.audit.equivalence,
        seed=config.audit.seed,
        provenance={
            "software": software_versions(),
            "model": config.model.path or "embedded Portraits model",
            "guidance": config.sampler.guidance,
            "sampler_steps": config.sampler.audit_steps,
            "scheduler": type(model.scheduler).__name__,
            "padding": config.model.padding,
            "detector": f"{config.detector.type}, the largest face of a picture counts",
            "sha256": plan.hashes,
        },
    )
    return Audit(plan, Measurer(detector, judge, clip, encoder, crop.crop_size, crop.expand), spec)
