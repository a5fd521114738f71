"""Run every stage of the Portraits model in order: renders, autoencoder, judges, encoders, diffusion, export.

Each stage continues from its own checkpoint, and a stage whose time is used up is skipped. So an interrupted command can
be repeated. `--scale 0.1` gives every stage a tenth of its time, and renders a tenth of the images.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# script, its flags, minutes on two cores (0: it has no --minutes)
STAGES: tuple[tuple[str, list[str], float], ...] = (
    ("train_vae.py", ["--threads", "2"], 30),
    ("train_judges.py", ["--threads", "2"], 0),
    ("train_encoders.py", ["--threads", "2"], 5),
    ("train_clip.py", ["--threads", "2"], 10),
    ("train_diffusion.py", ["--threads", "2"], 90),
    ("train_decoder.py", ["--threads", "2"], 20),
)


def commands(images: int, scale: float) -> list[list[str]]:
    """Return the argument lists of all stages."""
    rows = [["make_data.py", "--workers", "2", "--images", str(int(images * scale))]]
    for script, flags, minutes in STAGES:
        rows.append([script, *flags, *(["--minutes", str(minutes * scale)] if minutes else [])])
    return [*rows, ["export_weights.py"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    for command in commands(args.images, args.scale):
        start = time.monotonic()
        print("::", *command, flush=True)
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False)
        if done.returncode:
            raise SystemExit(f"{command[0]} stopped with code {done.returncode}; the same command goes on from there")
        print(f":: {command[0]} took {(time.monotonic() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
