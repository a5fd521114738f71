"""Upload a finished run to the Hugging Face hub, and check before training that the upload will be possible."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from fairdiff.errors import FairDiffError, blame


def require_name(repo: str, key: str) -> None:
    """Raise FairDiffError, beginning with `key`, unless `repo` is a valid name of the form owner/name."""
    with blame(key):
        validate_repo_id(repo)
    if "/" not in repo:
        raise FairDiffError(f"{key}: found {repo}, allowed: you/name")


def require_token(otherwise: str) -> None:
    """Raise FairDiffError if no token of the hub is known; otherwise: the alternative that the message names."""
    if get_token() is None:
        raise FairDiffError(f"HF_TOKEN: no token of the hub is known here; `hf auth login` asks for one, or use {otherwise}")


def require_access(repo: str, key: str = "hub") -> None:
    """Raise FairDiffError unless the name is valid, the hub answers, and the token is not a read-only one.

    Nothing is created on the hub, so it is not checked whether the token may write to this repository.
    """
    require_name(repo, key)
    require_token(f"{key}=null")
    try:
        owner = HfApi().whoami()
    except Exception as error:  # the hub and the network raise several types
        reason = " ".join(str(error).split())[:200]
        raise FairDiffError(
            f"{key}: {repo}: the hub does not answer to the token: {reason}; allowed: {key}=null, and scripts/push.py later"
        ) from error
    if owner.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise FairDiffError(f"HF_TOKEN: the token of {owner.get('name')} may only read, allowed: one that may write")


def files_of(run: Path, audit: Path | None = None) -> dict[str, Path]:
    """Return name on the hub -> file: the adapter's folder, and an audit of the run (None: the newest one)."""
    pages = sorted(run.glob("audits/*/report.html"), key=lambda page: page.stat().st_mtime)
    card = run / "adapter" / "README.md"
    if not pages or not card.exists():
        raise FairDiffError(f"{run}: found no finished training with a model card (adapter/README.md), allowed: a run folder")
    found = {path.name: path for path in sorted((run / "adapter").iterdir())}
    return found | {name: (audit or pages[-1].parent) / name for name in ("audit.json", "report.html")}


def push(run: Path, repo: str, audit: Path | None = None) -> str:
    """Upload `files_of` a run in one commit, make the repository if there is none, and return its URL.

    Raises FairDiffError if the hub or the network fails; the message says how to try again. The run is not changed.
    """
    files = files_of(run, audit)
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(repo, operations, commit_message="Adapter, model card and audit")
    except Exception as error:  # the hub and the network raise several types
        reason = " ".join(str(error).split())[:300]
        again = f"python scripts/push.py {run} {repo}"
        raise FairDiffError(f"{repo}: cannot be written: {reason}; the run is whole, and `{again}` tries again") from error
    return str(url)
