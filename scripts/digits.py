"""Check that a change of the code changes no result: the same commands and seeds must give the same digits.

python scripts/digits.py write docs/measurements/digits/before.json      four small runs, a few minutes
python scripts/digits.py compare docs/measurements/digits/before.json docs/measurements/digits/after.json

It compares the adapters' weights bit by bit, and all numbers of audit.json without their keys. The digits are comparable on
one machine with one set of versions only, so the file records both.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from fairdiff.audit.axis import software_versions
from fairdiff.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("audit.prompts=3", "audit.images_per_prompt=10", "audit.named=null", "audit.without_people=2")
# settings whose defaults may change are set explicitly, so that a new default changes no digit
RATE = "adapter.learning_rate=1e-2"
RUNS = {
    "main job": ("steps=4", "adapter=lora_text", "global_batch=24", "prompts.per_step=1", RATE, "loss.image=0.4"),
    "soft tokens, labour statistics": (
        "steps=3", "adapter=soft_tokens", "global_batch=24", RATE, "attribute=[gender,race]", "target.file=labour",
        "prompts.per_step=2", "loss.image=0.4", "gradient.type=unit",
    ),
    "both parts, weights of the paper": (
        "steps=3", "experiment=gender_race_age", "adapter=lora_both", "adapter.learning_rate=4e-3", "loss=paper",
        "loss.originals=1", "gradient.type=unit", "global_batch=12", "noise_pool=12", "sampler.train_steps=[4,6]",
    ),
    "several families, validated": (
        "steps=4", "experiment=multi_concept", "adapter=lora_text", "global_batch=12", "noise_pool=12", RATE,
        "prompts.per_step=1", "validation.every=2", "validation.prompts=1", "validation.images=8", "loss.image=0.4",
    ),
}  # fmt: skip


def numbers(tree: object) -> list[str]:
    """Return every number in nested mappings and lists, formatted by repr."""
    if isinstance(tree, dict):
        return [n for item in tree.values() for n in numbers(item)]
    if isinstance(tree, list):
        return [n for item in tree for n in numbers(item)]
    return [repr(tree)] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


def weights_hash(adapter: Path) -> str:
    """Return the SHA-256 of all tensors of an adapter folder, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(adapter.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{file.name} {name} {tuple(tensor.shape)}".encode())
            found.update(tensor.float().contiguous().numpy().tobytes())
    return found.hexdigest()


def carry_out(overrides: tuple[str, ...], folder: Path) -> dict:
    """Carry out one run in a new process, and return its adapter's hash and its audit's numbers."""
    command = [sys.executable, "train.py", *overrides, *SMALL, f"hydra.run.dir={folder}", f"cache={folder}/cache"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    audit = json.loads(next(folder.rglob("audit.json")).read_text(encoding="utf-8"))
    return {"adapter": weights_hash(folder / "adapter"), "audit": " ".join(sorted(numbers(audit)))}


def machine() -> dict:
    return {
        "processor": platform.processor() or platform.machine(),
        "capabilities": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "threads": torch.get_num_threads(),
        "software": software_versions(),
    }


def write(file: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        runs = {}
        for place, (name, overrides) in enumerate(RUNS.items()):
            print(f"{name}: {' '.join(overrides)}", flush=True)
            runs[name] = carry_out(overrides, Path(temporary) / str(place))
    write_json(file, {"machine": machine(), "runs": runs})


def differences(one: dict, other: dict) -> list[str]:
    """Return the differences between two files of `write` as lines, [] if there are none."""
    lines = []
    for name in one["runs"] | other["runs"]:
        a, b = (some["runs"].get(name) for some in (one, other))
        if a is None or b is None:
            lines.append(f"{name}: only in one of the files")
            continue
        if a["adapter"] != b["adapter"]:
            lines.append(f"{name}: other adapter weights")
        there, here = Counter(a["audit"].split()), Counter(b["audit"].split())
        gone, new = there - here, here - there
        if gone or new:
            some = ", ".join([f"-{n}" for n in list(gone)[:4]] + [f"+{n}" for n in list(new)[:4]])
            lines.append(f"{name}: {gone.total()} numbers of the audit gone, {new.total()} new ({some})")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("file", type=Path)
    compare = commands.add_parser("compare")
    compare.add_argument("files", type=Path, nargs=2)
    args = parser.parse_args(argv)
    if args.command == "write":
        write(args.file)
        return
    one, other = (json.loads(file.read_text(encoding="utf-8")) for file in args.files)
    if one["machine"] != other["machine"]:
        print(f"warning: another machine or other versions: {one['machine']} and {other['machine']}")
    lines = differences(one, other)
    print("\n".join(lines) or f"the same digits in {len(one['runs'])} runs")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
