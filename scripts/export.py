"""Export a trained adapter for another tool, or convert another tool's adapter to diffusers' format.

python scripts/export.py RUN --as kohya                            for A1111, ComfyUI and kohya's scripts, in RUN/exports
python scripts/export.py RUN --as merged_file --dtype float16      the whole model with the adapter in it, in one file
python scripts/export.py text_encoder_lora_EMA.pth --as diffusers --to outputs/released       the authors' released file
"""

import argparse
import tempfile
from pathlib import Path

from fairdiff.audit.card import EMBEDDED
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.diffusion.adapter_files import read_about
from fairdiff.diffusion.export import DTYPES, FORMATS, export
from fairdiff.diffusion.imports import FILES
from fairdiff.diffusion.released import convert
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", type=Path, metavar="RUN", help="a run, an adapter folder, or files of a tool")
    parser.add_argument("--as", dest="kind", required=True, choices=FORMATS)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="to be made; without it <RUN>/exports/<format>")
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the adapter, baked in")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--model", help="what it is for: folder, hub id or file; else that of adapter.json")
    args = parser.parse_args(argv)
    try:
        print(f"{args.kind}: {written(args)}")
    except (FairDiffError, OSError) as error:
        fail(error)


def written(args: argparse.Namespace) -> Path:
    """Write the export and return its folder."""
    if not 0 <= args.scale < float("inf"):
        raise FairDiffError(f"--scale: found {args.scale}, allowed: 0 or more")
    released = all(path.suffix == ".pth" for path in args.source)
    if len(args.source) > 1 and not released:
        raise FairDiffError(f"found {len(args.source)} adapters, allowed: one, or files *.pth as the authors released")
    for path in args.source:
        if not path.exists():
            raise FairDiffError(f"{path}: there is no such file or folder")
    run = args.source[0] / "adapter"
    source = run if run.is_dir() else args.source[0]
    if args.to is None and source.suffix in (*FILES, ".pth"):
        raise FairDiffError("--to: no value given, allowed: a new folder")
    if args.to is not None and args.to.exists():
        raise FairDiffError(f"--to: {args.to}: exists already, allowed: a new folder")
    to = args.to or source.parent / "exports" / args.kind
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or (SD15 if released else trained_on(source))
        if released:
            source = Path(temporary) / "adapter"
            convert(args.source, source, model)
        export(source, args.kind, to, model, args.scale, args.dtype)
    return to


def trained_on(adapter: Path) -> str | Path:
    """Return the model that adapter.json names."""
    found = read_about(adapter).get("base_model")
    if not isinstance(found, str):
        raise FairDiffError(f"--model: no value given, and {adapter} does not say; allowed: a folder, hub id or file")
    return weights("model") if found == EMBEDDED else found


if __name__ == "__main__":
    main()
