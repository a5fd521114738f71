"""Write the trained parts as fp16 safetensors into the package: model, judges, CLIP, image encoder, identity, bank."""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from stage import build_folder
from tokenizer import make_tokenizer
from train_clip import export_clip
from train_diffusion import load_denoiser, make_scheduler
from train_vae import load_vae

from fairdiff.files import write_json

LIMIT = 40_000_000  # bytes, all parts together
STAGED = ("judge", "audit_judge", "encoder", "identity")  # stages that already write the shipped folder format


def export_model(folder: Path, out: Path) -> None:
    """Write the model as a diffusers folder for StableDiffusionPipeline.from_pretrained."""
    net, vae = load_denoiser(folder), load_vae(folder)
    with torch.no_grad():  # averaging can leave denormals, which float16 rounds to 0
        pipeline = StableDiffusionPipeline(
            vae.half(),
            net.text_encoder.half(),
            make_tokenizer(folder / "tokenizer"),
            net.unet.half(),
            make_scheduler(),
            None,
            None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(out, safe_serialization=True)
    about = out / "text_encoder" / "config.json"  # else transformers would load it in half precision
    write_json(about, json.loads(about.read_text(encoding="utf-8")) | {"dtype": "float32"})
    about = out / "vae" / "config.json"  # diffusers adds the path of a loaded VAE
    write_json(about, {k: v for k, v in json.loads(about.read_text(encoding="utf-8")).items() if k != "_name_or_path"})
    (out / "tokenizer" / "tokenizer.json").unlink()  # 3.6 MB; the two files below are 1.5 and load to the same ids
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / "tokenizer" / name, out / "tokenizer" / name)


def replace_folder(new: Path, old: Path) -> None:
    """Replace the folder `old` by `new`."""
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def export(folder: Path, out: Path, parts: list[str]) -> dict[str, int]:
    """Export the parts whose stage has run, and return the bytes of each."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for part in parts:
        fresh = out / f".{part}.part"
        shutil.rmtree(fresh, ignore_errors=True)
        if part == "model" and (folder / "diffusion.pt").exists():
            export_model(folder, fresh)
        elif part == "clip" and (folder / "clip.pt").exists():
            export_clip(folder, fresh)
        elif part in STAGED and (folder / part).is_dir():
            shutil.copytree(folder / part, fresh)
        else:
            print(f"{part}: not trained yet, left as it is")
            continue
        replace_folder(fresh, out / part)
        sizes[part] = sum(path.stat().st_size for path in (out / part).rglob("*") if path.is_file())
    return sizes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[2] / "fairdiff" / "portraits" / "weights"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--parts", nargs="+", default=["model", "clip", *STAGED])
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    sizes = export(build_folder(), args.out, args.parts)
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(json.dumps(sizes | {"total": total}, indent=1))
    if total > LIMIT:
        raise SystemExit(f"export: {total} bytes, more than the {LIMIT} that may be shipped")


if __name__ == "__main__":
    main()
