"""Write files atomically. `fairdiff.files` has more, but this package must work without fairdiff."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` if the block ends without an error. Missing folders are made."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
