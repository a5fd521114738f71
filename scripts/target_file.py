"""Write a target file to fill in: a row for each subject of a run, with equal shares or those of `target.<attribute>`.

python scripts/target_file.py target.file=shares.csv prompts.train=train.txt prompts.test=test.txt
python train.py target.file=shares.csv prompts.train=train.txt prompts.test=test.txt                 after filling it in
"""

from pathlib import Path

from fairdiff.cli.main import main
from fairdiff.config import Config
from fairdiff.plan import write_targets


def write(config: Config, folder: Path) -> None:
    print(f"targets: {write_targets(config)}")


task = main(write)

if __name__ == "__main__":
    task()
