"""Files written whole or not at all. `fairdiff.files` has more; these networks work without that package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends without an error. Missing folders are made."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
