"""FairDiff: fine-tune text-to-image models towards a distribution of your choice, and audit them with intervals.

    load_adapter(pipe, path)    audit(pipe, prompts, target=...)    train(overrides)

The three functions are in fairdiff/library.py. `import fairdiff` is quick: torch and diffusers are imported when one of
them is first used.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import fairdiff.audit as _room  # quick, because its __init__ holds a docstring only

if TYPE_CHECKING:
    from fairdiff.library import audit, load_adapter, train

__all__ = ["audit", "load_adapter", "train"]


class _Room(ModuleType):
    """The package fairdiff.audit made callable, because the function `fairdiff.audit` has the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fairdiff import library

        return library.audit(*args, **kwargs)


_room.__class__ = _Room


def __getattr__(name: str) -> Any:
    """Import the functions of the library when they are first used (PEP 562)."""
    if name in ("load_adapter", "train"):
        from fairdiff import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__} has no {name}")
