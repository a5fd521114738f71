"""The released adapters of the paper (Shen et al., ICLR 2024) as a folder that this project and plain diffusers load.

python scripts/convert.py text_encoder_lora_EMA.pth outputs/released            also with unet_lora_EMA.pth, or
                                                                                prefix_embedding_EMA.pth alone
python scripts/convert.py unet_lora_EMA.pth outputs/released --model <folder>   Stable Diffusion 1.5 in a folder
python scripts/audit.py model=sd15 model.padding=longest adapter=lora_text adapter.path=outputs/released
"""

import argparse
from pathlib import Path

from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.diffusion.released import convert
from fairdiff.errors import FairDiffError

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="file", help="*.pth as released")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument(
        "--model", default=SD15, help="what they are for, whose layers they must have: folder or hub id"
    )
    args = parser.parse_args(argv)
    try:
        about = convert(args.files, args.folder, args.model)
    except (FairDiffError, OSError) as error:
        fail(error)
    print(f"{args.folder}: {about['options']}")


if __name__ == "__main__":
    main()
