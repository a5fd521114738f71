"""Upload a run's adapter with its model card, its audit.json and its report to the Hugging Face hub.

python scripts/push.py RUN you/fair-adapter               needs a token: `hf auth login`
python scripts/push.py RUN you/fair-adapter --dry-run     say what would be uploaded, and upload nothing
"""

import argparse
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError, blame


def files_of(run: Path) -> dict[str, Path]:
    """Name on the hub -> file: the adapter's folder, and the newest audit of the run."""
    pages = sorted(run.glob("audits/*/report.html"), key=lambda page: page.stat().st_mtime)
    card = run / "adapter" / "README.md"
    if not pages or not card.exists():
        raise FairDiffError(f"{run}: found no finished training with a model card (adapter/README.md), allowed: a run folder")
    found = {path.name: path for path in sorted((run / "adapter").iterdir())}
    return found | {name: pages[-1].parent / name for name in ("audit.json", "report.html")}


def push(run: Path, repo: str, dry: bool) -> list[str]:
    """What was, or would be, uploaded, a line each. FairDiffError without a token, and for what the hub refuses."""
    files = files_of(run)
    with blame("repo"):
        validate_repo_id(repo)
    if not dry:
        if get_token() is None:
            raise FairDiffError("HF_TOKEN: no token of the hub is known here; `hf auth login` asks for one, or use --dry-run")
        api = HfApi()
        try:
            api.create_repo(repo, exist_ok=True)
            operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            api.create_commit(repo, operations, commit_message="Adapter, model card and audit")
        except Exception as error:  # of the hub and of the network, each of its own
            raise FairDiffError(f"{repo}: cannot be written: {' '.join(str(error).split())[:300]}") from error
    return [f"{repo}/{name}: {path} ({path.stat().st_size:,} bytes)" for name, path in files.items()]


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of train.py")
    parser.add_argument("repo", metavar="REPO", help="you/name")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    try:
        for line in push(args.run, args.repo, args.dry_run):
            print(line)
    except (FairDiffError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
