"""The commands that reproduce docs/results.md and docs/search.md."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from fairdiff.portraits.occupations import MEASURED_WORDS

EXPERIMENTS = ("gender", "gender_tokens", "race", "gender_race", "gender_race_age", "multi_concept")
ADAPTERS = ("lora_text", "lora_unet", "lora_both", "soft_tokens")
IMAGE_SHARES = (0.05, 1.2, 4)  # relative shares of the image term; the default (.4, soft tokens .17) is the run at scale 1
AUDIT = "scripts/audit.py"
BLIND = ("prompts.named=0", "optimizer.schedule=linear")  # as they were measured
SCALES = (0.25, 0.5, 0.75, 1, 1.25)
SAME_TRAINING = {"gender": "lora_both", "gender_tokens": "soft_tokens"}  # experiments with the training of the main job
PROMPTS = 48  # audited prompts of the experiments, each with a different occupation
SOME = {"multi_concept": 12}  # audited prompts of each of its four families
GROUPS = {
    "words": "Words alone, without an adapter",
    "adapters": "The main job with each adapter",
    "without_named": "The main job without prompts that name a class",
    "experiments": "The paper's experiments",
    "targets": "Other targets",
    "frontier": "Bias against semantics",
}


@dataclass(frozen=True)
class Run:
    """One command: its group, its name in the table, its overrides, its seed.

    of: the run whose adapter it audits. same: the run whose folder and training it uses for another audit.
    """

    group: str
    name: str
    overrides: tuple[str, ...]
    seed: int
    of: "Run | None" = None
    same: "Run | None" = None
    script: str = "train.py"

    @property
    def needs(self) -> "Run | None":
        """The run that must be done before this one."""
        return self.of or self.same

    def _place(self, root: Path) -> Path:
        name = "".join(c for c in self.name.replace(" ", "_") if c not in ',"')
        return root / self.group / name / f"seed{self.seed}"

    def folder(self, root: Path) -> Path:
        """Return the run folder."""
        return self.same.folder(root) if self.same else self._place(root)

    def log(self, root: Path) -> Path:
        """Return the file with the output of its command; the last line names the report."""
        return self._place(root).with_suffix(".log")

    def audit(self, root: Path) -> Path:
        """Return audit.json beside the report that the command named last."""
        line = self.log(root).read_text(encoding="utf-8").rstrip().splitlines()[-1]
        return Path(line.removeprefix("report: ")).with_name("audit.json")

    def record(self, records: Path) -> Path:
        """Return the file with the audit's numbers for the page."""
        return self._place(records).with_suffix(".json")

    @property
    def shown(self) -> str:
        """The command as shown on a page."""
        adapter = f" adapter.path=<{self.of.name}>/adapter" if self.of else ""
        return shlex.join(["python", self.script, *self.overrides]) + adapter

    def command(self, root: Path) -> list[str]:
        """Return the arguments after `python`."""
        own = [self.script, *self.overrides, f"seed={self.seed}", f"hydra.run.dir={self.folder(root)}"]
        return own if self.of is None else [*own, f"adapter.path={self.of.folder(root) / 'adapter'}"]


def plan(seeds: list[int], images: int) -> list[Run]:
    """Return all runs, with the cheap and informative ones first."""
    first, runs = seeds[0], []
    for words, template in MEASURED_WORDS.items():
        own = (f"prompts.template='{template}'", f"audit.prompts={PROMPTS}", f"audit.images_per_prompt={images}")
        runs.append(Run("words", words, own, first, script=AUDIT))
    full = {e: (f"audit.prompts={SOME.get(e, PROMPTS)}", f"audit.images_per_prompt={images}") for e in EXPERIMENTS}
    for seed in seeds:
        main = {adapter: Run("adapters", adapter, (f"adapter={adapter}",), seed) for adapter in ADAPTERS}
        runs += main.values()
        if seed == first:
            blind = {adapter: (f"adapter={adapter}", *BLIND) for adapter in ADAPTERS if adapter != "soft_tokens"}
            runs += [Run("without_named", adapter, own, seed) for adapter, own in blind.items()]
        for name in EXPERIMENTS:
            same = main.get(SAME_TRAINING.get(name))
            own = same.overrides if same else (f"experiment={name}",)
            runs.append(Run("experiments", name, (*own, *full[name]), seed, same=same))
        labour = ("experiment=gender_race", "target.file=labour", *full["gender_race"])
        runs.append(Run("targets", "labour statistics", labour, seed))
    return runs + frontier(first)


def frontier(seed: int) -> list[Run]:
    """Return the runs on 12 test prompts for each kind of adapter: trained image shares, and scales of the main job."""
    runs = []
    for adapter in ADAPTERS:
        trained = Run("adapters", adapter, (f"adapter={adapter}",), seed)
        kind = (*trained.overrides, "audit.prompts=12")
        for scale in SCALES:
            own = (*kind, f"adapter.scale={scale}")
            runs.append(Run("frontier", f"{adapter}, scale {scale}", own, seed, of=trained, script=AUDIT))
        for share in IMAGE_SHARES:
            own = (*kind, f"loss.image={share}")
            runs.append(Run("frontier", f"{adapter}, image share {share}", own, seed))
    return runs
