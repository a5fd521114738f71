"""Which commands make docs/results.md."""

from dataclasses import dataclass
from pathlib import Path

EXPERIMENTS = ("gender", "gender_tokens", "race", "gender_race", "gender_race_age", "multi_concept")
ADAPTERS = ("soft_tokens", "lora_text", "lora_unet", "lora_both")
IMAGE_WEIGHTS = {  # beside that of conf/tuning/model, 1 to 3, at scale 1
    "soft_tokens": (0, 8, 32), "lora_text": (0, 8, 32), "lora_both": (0, 8, 32),
    "lora_unet": (8, 32),  # with 0 training gives up: after 41 steps no picture shows a face
}  # fmt: skip
SCALES = (0.25, 0.5, 0.75, 1, 1.25)
SOME = {"multi_concept": ("audit.prompts=12",)}  # of each family: there are 440 test prompts of styled occupations alone
GROUPS = {
    "adapters": "The main job with each adapter",
    "experiments": "The paper's experiments",
    "targets": "Other targets",
    "frontier": "Bias against semantics",
}


@dataclass(frozen=True)
class Run:
    """One command: its group, its name in the table, its overrides, its seed; `of`: the run whose adapter it audits."""

    group: str
    name: str
    overrides: tuple[str, ...]
    seed: int
    of: "Run | None" = None

    def folder(self, root: Path) -> Path:
        return root / self.group / self.name.replace(",", "").replace(" ", "_") / f"seed{self.seed}"

    def audit(self, root: Path) -> Path:
        return self.folder(root) / "audit.json"

    def record(self, records: Path) -> Path:
        """What the page keeps of the audit."""
        return self.folder(records).with_suffix(".json")

    @property
    def script(self) -> str:
        return "train.py" if self.of is None else "scripts/audit.py"

    def command(self, root: Path) -> list[str]:
        """The arguments after `python`."""
        own = [self.script, *self.overrides, f"seed={self.seed}", f"hydra.run.dir={self.folder(root)}"]
        return own if self.of is None else [*own, f"adapter.path={self.of.folder(root) / 'adapter'}"]


def plan(seeds: list[int], images: int) -> list[Run]:
    """All runs, the cheap and telling ones first."""
    first, runs = seeds[0], []
    for adapter in ADAPTERS:
        runs.append(Run("adapters", adapter, (f"adapter={adapter}",), first))
    both = ("attribute=[gender,race]", "adapter=lora_text")
    runs.append(Run("adapters", "lora_text, gender and race", both, first))
    things = (*both, "+prompts.families.object=1")
    runs.append(Run("adapters", "lora_text, gender and race, also without people", things, first))
    full = ("audit=full", f"audit.images_per_prompt={images}")
    for seed in seeds:
        for experiment in EXPERIMENTS:
            own = (f"experiment={experiment}", *full, *SOME.get(experiment, ()))
            runs.append(Run("experiments", experiment, own, seed))
    labour = ("experiment=gender_race", "target.file=labour", *full)
    runs.append(Run("targets", "labour statistics", labour, first))
    return runs + frontier(first)


def frontier(seed: int) -> list[Run]:
    """Image weights trained anew and scales of the main job's adapter, for each kind of adapter, on 12 test prompts."""
    runs = []
    for adapter in ADAPTERS:
        trained = Run("adapters", adapter, (f"adapter={adapter}",), seed)
        kind = (*trained.overrides, "audit.prompts=12")
        for scale in SCALES:
            runs.append(Run("frontier", f"{adapter}, scale {scale}", (*kind, f"adapter.scale={scale}"), seed, trained))
        for weight in IMAGE_WEIGHTS[adapter]:
            runs.append(Run("frontier", f"{adapter}, image weight {weight}", (*kind, f"loss.image={weight}"), seed))
    return runs
