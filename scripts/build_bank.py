"""Build a bank of real faces for the face term from a folder of images, with the settings of the run that will use it.

python scripts/build_bank.py <folder> model=sd15 features.identity=<face embedder> features.bank=faces.safetensors
python train.py model=sd15 judge.path=<classifier> features.identity=<face embedder> features.bank=faces.safetensors

Images that cannot be read, or do not have exactly one face, are left out and counted. Repeat the command to continue.
"""

import argparse
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from safetensors import SafetensorError

from classifiers.bank import Collected, collect, embedding_of, pictures_in
from classifiers.identity import Bank, read_rows, save_bank
from fairdiff import builder, fingerprint
from fairdiff.cli.ending import ending
from fairdiff.cli.main import CONF, fail, to_config, told
from fairdiff.config import Config
from fairdiff.diffusion.load import check_device
from fairdiff.errors import FairDiffError, blame
from fairdiff.training.tracking import make_console, progress


def configure(settings: list[str]) -> Config:
    with initialize_config_dir(CONF, version_base="1.3"):
        return to_config(compose("config", settings))


def make(folder: Path, config: Config) -> str:
    """Write the bank unless it exists, and return a line with its number of faces."""
    if config.features.bank is None:
        raise FairDiffError("features.bank: found null, allowed: the file to be made, such as faces.safetensors")
    file = Path(config.features.bank)
    with blame("folder"):
        pictures = pictures_in(folder)
    check_device(config.model.device)
    detector, embedder = builder.build_detector(config), builder.build_embedder(config)
    maker = builder.embedder_fingerprint(embedder)
    sizes = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in pictures]
    request = fingerprint.of_values(maker, builder.detector_fingerprint(config, detector), sizes)
    if file.exists():
        return f"{file}: {refuse_another(file, request)} faces, made before"
    part = file.with_name(f"{file.name}.part")
    embed = partial(embedding_of, detector=detector, embedder=embedder, device=config.model.device)
    known = Collected()
    with progress(make_console()) as bar:
        task = bar.add_task("pictures", total=len(pictures), note="")
        for known in collect(pictures, embed, part, request, embedder.config["dim"]):
            bar.update(task, completed=known.done, note=f"{len(known.rows)} faces")
    if not known.rows:
        raise FairDiffError(f"folder: {folder}: {known}; allowed: pictures of one person each")
    save_bank(Bank(known.stacked()), file, maker, request=request)
    part.unlink(missing_ok=True)
    return f"{file}: {known}"


def refuse_another(file: Path, request: str) -> int:
    """Return the number of faces in an existing bank of the same request. FairDiffError for any other file."""
    try:
        rows_ND, about = read_rows(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise FairDiffError(f"features.bank: {file}: is there and no bank; allowed: a new name") from error
    if about.get("request") != request:
        raise FairDiffError(
            f"features.bank: {file}: is there, made from other pictures or with another embedder or detector; allowed: a "
            "new name, or remove it"
        )
    return len(rows_ND)


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of pictures, searched with all folders in it")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, as for train.py")
    args = parser.parse_args(argv)
    try:
        print(make(args.folder, configure(args.settings)))
    except Exception as error:
        fail(told(error))


if __name__ == "__main__":
    main()
