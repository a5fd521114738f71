"""Find the parts of a LoRA that cause its effect, the smallest part that keeps it, and whether training can avoid them.

python scripts/localize.py outputs/gender/default/seed0            scores, sparse adapters, audits; repeat it to continue
python scripts/localize.py RUN --retrain 0.1 0.4                   also retrain with the first 10 or 40 % held at zero
python scripts/localize.py RUN --other RUN2                        also the overlap of the parts of two adapters
python scripts/localize.py RUN --set audit.prompts=12 audit.images_per_prompt=24     with other settings of train.py
python scripts/localize.py --render                                only the page; --publish writes docs/studies/localize.md

Scores use training prompts, audits use validation prompts (`--test`: test prompts, for the final page). An adapter trained
for several attributes is also scored by each of them alone, to compare their parts. `--retrain` trains twice for each share,
without the first components by score and without random ones, with the steps of the run. All files are in outputs/localize;
the smallest adapter that keeps 90 % of the effect is copied to the folder `sparse` there. The numbers for the page are in
outputs/reproduced/measurements/studies/localize.json.
"""

import argparse
import json
import shlex
import shutil
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from harness.audits import audited, prompt_biases
from harness.localize_page import page, smallest
from harness.methods import adapter as saved_adapter
from harness.publish import add_study, conclude
from harness.retrain import retrained
from rich.progress import track

from fairdiff import builder, fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import targeted
from fairdiff.cli.compose import saved, with_defaults
from fairdiff.cli.ending import ending
from fairdiff.config import Config
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.adapters import modules_of
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import read_lora, shapes_of
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_json
from fairdiff.plan import make_plan
from fairdiff.studies.edits import save_edit
from fairdiff.studies.localize import (
    Component,
    Place,
    Split,
    common_places,
    components,
    first,
    gate_gradients,
    kept,
    orders,
    overlap,
    split,
)
from fairdiff.studies.page import Page
from fairdiff.training.step import training_step
from fairdiff.training.trainer import draw_batches

SHARES = (0.05, 0.1, 0.2, 0.4, 0.7)
BATCHES = 12
ALIGNED = ("adapter.scale=1", "loss.image=null", "loss.face=null", "validation.every=null", "tracker=null")


def folder_of(run: Path, batches: int, root: Path) -> Path:
    """Return the folder for a run, named by the run and a hash of its LoRA and `batches`. FairDiffError without LoRA."""
    file = run / "adapter" / LORA_FILE
    if not file.is_file() or not (run / "config.yaml").is_file():
        raise FairDiffError(f"{run}: holds no config.yaml with adapter/{LORA_FILE}, allowed: a finished run with LoRA")
    key = fingerprint.of_values(fingerprint.of_files([file]), batches)
    return root / "-".join([*run.resolve().parts[-3:], key[:8]])


def scored(run: Path, batches: int, folder: Path, attribute: str | None = None) -> list[list]:
    """Return [part, layer, i, size, score, score] of each component of a run's LoRA; cached in `folder`.

    attribute: use the loss of this attribute alone, None: that of the training. The scores are from even and odd batches.
    """
    path = folder / f"scores-{attribute or 'training'}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    config = _of_one(saved(run / "config.yaml", [f"adapter.path={run / 'adapter'}", *ALIGNED]), attribute)
    plan = make_plan(config)
    model, perception = builder.build_model(config), builder.build_perception(config, plan)
    splits = _splits(run / "adapter", model)
    trainee = builder.build_trainee(config, plan, model, perception)
    schedule, people = builder.build_schedule(config, plan), [p for p in plan.train if p.people and not p.names]
    sizes = components(splits)
    scores = {c: [0.0, 0.0] for c in sizes}
    for step in track(range(batches), f"gradients by gates, {attribute or 'training'}"):
        for parameter in trainee.adapter.parameters():
            parameter.grad = None
        training_step(trainee, draw_batches(people, schedule, step)[0])
        for component, value in gate_gradients(trainee.adapter, splits).items():
            scores[component][step % 2] += abs(value) / ((batches + 1 - step % 2) // 2)
    found = [[*c, sizes[c], *scores[c]] for c in sorted(sizes)]
    write_json(path, found)
    return found


def _of_one(config: Config, attribute: str | None) -> Config:
    """Return the settings with this attribute and its target only; unchanged for None."""
    if attribute is None:
        return config
    target = {name: config.target[name] for name in ("file", attribute)}
    return replace(config, attributes={attribute: config.attributes[attribute]}, target=target)


def _splits(adapter: Path, model: DiffusionModel) -> dict[Place, Split]:
    """Return the singular components of the LoRA in a folder. Call it before an adapter is added to the model."""
    modules = modules_of(model, "text_encoder") | modules_of(model, "unet")
    return split(read_lora(adapter / LORA_FILE, shapes_of(modules)))


def tables(found: list[list]) -> tuple[dict[Component, float], list[dict[Component, float]]]:
    """Return the sizes, and a list of three scores: from all batches, from the even and from the odd ones."""
    rows = [((part, layer, i), size, even, odd) for part, layer, i, size, even, odd in found]
    scores = [{c: (even + odd) / 2 for c, _, even, odd in rows}, {c: e for c, _, e, _ in rows}, {c: o for c, *_, o in rows}]
    return {c: size for c, size, *_ in rows}, scores


def overlaps(one: list[list], other: list[list], same: bool) -> list[list]:
    """Return a row for each share: share, overlap, its range by chance, and the smaller self-overlap.

    The self-overlap of a LoRA compares the scores of its even and odd batches.
    """
    ranked = []
    for found in (one, other):
        sizes, scores = tables(found)
        ranked.append([orders(sizes, some, 0)["score"] for some in scores])
    rows = []
    for share in SHARES[:-1]:
        value, ends = overlap(ranked[0][0], ranked[1][0], share, same)
        again = min(overlap(even, odd, share, same)[0] for _, even, odd in ranked)
        rows.append([share, value, list(ends), again])
    return rows


@dataclass(frozen=True)
class Study:
    """One run's LoRA: its components and their orders, the settings of audits, and the output folder."""

    run: Path
    model: DiffusionModel
    splits: dict[Place, Split]
    ranked: dict[str, list[Component]]
    settings: list[str]
    folder: Path

    def audited(self, name: str, adapter: Path) -> dict:
        """Audit an adapter and return its numbers for the page: bias of each prompt by attribute, noise floor, DINO."""
        audit = read_audit(audited(self.settings, saved_adapter(name, adapter), self.folder / "audits") / "audit.json")
        attributes = audit["models"]["after"]["attributes"]
        wanted = targeted(audit)
        return {
            "before": {a: prompt_biases(audit, "before", a) for a in wanted},
            "after": {a: prompt_biases(audit, "after", a) for a in wanted},
            "floor": {a: attributes[a]["bias"]["floor"] for a in wanted},
            "dino": audit["models"]["after"]["dino"]["mean"],
            "size": [audit["prompts"], audit["images_per_prompt"]],
        }

    def sparse(self, name: str, chosen: list[Component]) -> dict:
        """Save the adapter of these components as adapters/<name>, audit it, and return the numbers of `audited`."""
        where = self.folder / "adapters" / name
        if not where.exists():  # rewriting could change the order of the header, and an audit would take it for a new file
            with atomic_path(where) as temporary:
                temporary.mkdir()
                save_edit(temporary, kept(self.splits, chosen), self.model.kind)
        return self.audited(name, where)

    def retrained(self, order: str, share: float) -> dict:
        """Audit the LoRA without the first components of an order, and a new training with them held at zero."""
        held, name = first(self.ranked[order], share), f"{order}-{share:g}"
        sizes = components(self.splits)
        row = {"order": order, "share": share, "components": len(held)}
        row["removed"] = self.sparse(f"without-{name}", sorted(sizes.keys() - set(held)))
        anew = retrained(self.run, self.splits, held, self.folder / "retrained")
        row["retrained"] = self.audited(f"retrained-{name}", anew)
        return row | {"common": common_places(components(_splits(anew, self.model)), sizes)}


def measure(args: argparse.Namespace, kept_in: Path) -> None:
    """Compute scores, sparse and retrained adapters and their audits, and write each to `kept_in` as soon as it is done."""
    folder = folder_of(args.run, args.batches, args.folder)
    found = scored(args.run, args.batches, folder)
    sizes, scores = tables(found)
    config = saved(args.run / "config.yaml", [])
    split_name, attributes = "test" if args.test else "validation", list(config.attributes)
    usual = [f"audit.split={split_name}", f"attribute=[{','.join(attributes)}]", "audit.named=1", "audit.without_people=1"]
    settings = with_defaults(args.set, usual)
    record = {"run": args.run.as_posix(), "split": split_name, "settings": settings, "batches": args.batches}
    record |= {"components": [[*c, sizes[c], scores[0][c]] for c in sizes], "points": {}, "retrained": [], "overlaps": []}
    model = builder.build_model(config)
    ranked, splits = orders(sizes, scores[0], 0), _splits(args.run / "adapter", model)
    study = Study(args.run, model, splits, ranked, settings, folder)
    places = [("whole", 1.0, list(sizes))]
    places += [(order, share, first(names, share)) for order, names in ranked.items() for share in SHARES]
    for order, share, chosen in track(places, "sparse adapters"):
        point = {"share": share, "components": len(chosen)} | study.sparse(f"{order}-{share:g}", chosen)
        record["points"].setdefault(order, []).append(point)
        write_json(kept_in, record)
    copy_smallest(record["points"], folder)
    for order, share in track([(o, s) for s in args.retrain for o in ("score", "random")], "trainings"):
        record["retrained"].append(study.retrained(order, share))
        write_json(kept_in, record)
    apart = {name: scored(args.run, args.batches, folder, name) for name in attributes if len(attributes) > 1}
    for one, other in combinations(apart, 2):
        record["overlaps"].append({"of": [one, other], "same": True, "rows": overlaps(apart[one], apart[other], True)})
    if args.other is not None:
        other = scored(args.other, args.batches, folder_of(args.other, args.batches, args.folder))
        both = [args.run.as_posix(), args.other.as_posix()]
        record["overlaps"].append({"of": both, "same": False, "rows": overlaps(found, other, False)})
    write_json(kept_in, record)


def copy_smallest(points: dict, folder: Path) -> None:
    """Copy the smallest adapter that keeps enough of the effect on every attribute to `folder`/sparse, if there is one."""
    least, to = smallest(points, list(points["whole"][0]["before"])), folder / "sparse"
    if least is None:
        shutil.rmtree(to, ignore_errors=True)
        return
    with atomic_path(to) as temporary:
        shutil.copytree(folder / "adapters" / f"{least[0]}-{least[1]['share']:g}", temporary)


def check(args: argparse.Namespace) -> None:
    """Raise FairDiffError for impossible arguments."""
    if args.run is None:
        raise FairDiffError("run: found none, allowed: the folder of a finished run with LoRA, or --render")
    if wrong := [share for share in args.retrain if not 0 < share < 1]:
        raise FairDiffError(f"--retrain: found {wrong[0]:g}, allowed: above 0, below 1")
    if args.batches < 2:
        raise FairDiffError(f"--batches: found {args.batches}, allowed: 2 or more")


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a finished run with LoRA")
    parser.add_argument("--other", type=Path, metavar="RUN", help="another one, for the overlap of their parts")
    parser.add_argument("--retrain", nargs="+", type=float, default=[], metavar="SHARE", help="shares held at zero")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of the scores; default: {BATCHES}")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of the audits")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    add_study(parser, "localize")
    args = parser.parse_args(argv)

    def measured(kept_in: Path) -> None:
        check(args)
        measure(args, kept_in)

    def made(found: dict) -> Page:
        return page(found, shlex.join(["python", "scripts/localize.py", found["run"]]))

    conclude(args, "localize", measured, made)


if __name__ == "__main__":
    main()
