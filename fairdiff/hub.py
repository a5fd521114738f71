"""Upload a finished run to the Hugging Face hub, and check before training that this will be possible."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from fairdiff.errors import FairDiffError, blame


def require_name(repo: str, key: str) -> None:
    """FairDiffError, beginning with the key, unless this can be a repository's name with its owner's before it."""
    with blame(key):
        validate_repo_id(repo)
    if "/" not in repo:
        raise FairDiffError(f"{key}: found {repo}, allowed: you/name")


def require_token(otherwise: str) -> None:
    """FairDiffError where no token of the hub is known; otherwise: what else is allowed."""
    if get_token() is None:
        raise FairDiffError(f"HF_TOKEN: no token of the hub is known here; `hf auth login` asks for one, or use {otherwise}")


def require_access(repo: str, key: str = "hub") -> None:
    """FairDiffError unless the name is one, the hub is reached and it knows the token as one that may write.

    Nothing is made there: whether the token may write to this very repository shows when it does.
    """
    require_name(repo, key)
    require_token(f"{key}=null")
    try:
        owner = HfApi().whoami()
    except Exception as error:  # of the hub and of the network, each of its own
        reason = " ".join(str(error).split())[:200]
        raise FairDiffError(
            f"{key}: {repo}: the hub does not answer to the token: {reason}; allowed: {key}=null, and scripts/push.py later"
        ) from error
    if owner.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise FairDiffError(f"HF_TOKEN: the token of {owner.get('name')} may only read, allowed: one that may write")


def files_of(run: Path, audit: Path | None = None) -> dict[str, Path]:
    """Name on the hub -> file: the adapter's folder, and an audit of the run, the newest one where none is given."""
    pages = sorted(run.glob("audits/*/report.html"), key=lambda page: page.stat().st_mtime)
    card = run / "adapter" / "README.md"
    if not pages or not card.exists():
        raise FairDiffError(f"{run}: found no finished training with a model card (adapter/README.md), allowed: a run folder")
    found = {path.name: path for path in sorted((run / "adapter").iterdir())}
    return found | {name: (audit or pages[-1].parent) / name for name in ("audit.json", "report.html")}


def push(run: Path, repo: str, audit: Path | None = None) -> str:
    """Upload `files_of` a run in one commit, to a repository that is made where there is none; where it lies then.

    FairDiffError for what the hub or the network refuses, which says how to try again: the run is not touched.
    """
    files = files_of(run, audit)
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(repo, operations, commit_message="Adapter, model card and audit")
    except Exception as error:  # of the hub and of the network, each of its own
        reason = " ".join(str(error).split())[:300]
        again = f"python scripts/push.py {run} {repo}"
        raise FairDiffError(f"{repo}: cannot be written: {reason}; the run is whole, and `{again}` tries again") from error
    return str(url)
