"""Build live objects from configuration and plan. No module below this one sees a configuration.

    model, adapter, judges (whatever looks at images) -> training;  audit, and of given pictures: pictures

Imports everything below; jobs, describe and scripts import it. Audits have names of their own: `builder.audit`.
"""

from fairdiff.builder.adapter import adapter_fingerprint, adapter_options, build_adapter, build_saved_adapter, imported
from fairdiff.builder.judges import (
    Judge,
    bank_file,
    build_bank,
    build_classifier,
    build_clip,
    build_detector,
    build_embedder,
    build_encoder,
    build_encoders,
    build_perception,
    crop_of,
    detector_fingerprint,
    embedder_fingerprint,
    judge_fingerprint,
    perception_fingerprint,
)
from fairdiff.builder.model import build_model, clip_skip, image_size, model_path, precisions
from fairdiff.builder.training import (
    build_objective,
    build_schedule,
    build_trainee,
    build_validation,
    compared_images,
    originals_fingerprint,
    training_fingerprint,
    training_pieces,
)

__all__ = [
    "Judge",
    "adapter_fingerprint",
    "adapter_options",
    "bank_file",
    "build_adapter",
    "build_bank",
    "build_classifier",
    "build_clip",
    "build_detector",
    "build_embedder",
    "build_encoder",
    "build_encoders",
    "build_model",
    "build_objective",
    "build_perception",
    "build_saved_adapter",
    "build_schedule",
    "build_trainee",
    "build_validation",
    "clip_skip",
    "compared_images",
    "crop_of",
    "detector_fingerprint",
    "embedder_fingerprint",
    "image_size",
    "imported",
    "judge_fingerprint",
    "model_path",
    "originals_fingerprint",
    "perception_fingerprint",
    "precisions",
    "training_fingerprint",
    "training_pieces",
]
