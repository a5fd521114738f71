"""Where in a LoRA the effect sits, and how little of it keeps the effect: sparse adapters by score, by size and at random.

python scripts/localize.py outputs/gender/default/seed0            scores, sparse adapters, audits; the same command goes on
python scripts/localize.py RUN --other RUN2                        beside it how far the parts of both adapters overlap
python scripts/localize.py RUN --set audit.prompts=12 audit.images_per_prompt=24     with other settings of train.py
python scripts/localize.py --render                                only the page; --publish writes docs/studies/localize.md

Scores come from training prompts, audits from validation prompts (`--test`: test prompts, for the final page). Everything
lies under outputs/localize; the smallest adapter that keeps 90 % of the effect is in its folder `sparse`. What the page needs
is kept in outputs/reproduced, in measurements/studies/localize.json.
"""

import argparse
import json
import shlex
from pathlib import Path

from harness.audits import audited, prompt_biases
from harness.localize_page import page
from harness.methods import adapter as saved_adapter
from harness.publish import publish, read_record, record_of
from reproduce.place import ROOT, add_place
from rich.progress import track

from fairdiff import builder, fingerprint
from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import targeted
from fairdiff.cli.compose import saved
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
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
    components,
    first,
    gate_gradients,
    kept,
    orders,
    overlap,
    split,
)
from fairdiff.training.step import training_step
from fairdiff.training.trainer import draw_batches

SHARES = (0.05, 0.1, 0.2, 0.4, 0.7)
BATCHES = 12


def scored(run: Path, batches: int, folder: Path) -> dict:
    """The components of a run's LoRA with size and score, and its factors' file; kept in `folder`/scores.json."""
    file = run / "adapter" / LORA_FILE
    if not file.is_file() or not (run / "config.yaml").is_file():
        raise FairDiffError(f"{run}: holds no config.yaml with adapter/{LORA_FILE}, allowed: a finished run with LoRA")
    key, path = [fingerprint.of_files([file]), batches], folder / "scores.json"
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return found
    aligned = [f"adapter.path={run / 'adapter'}", "adapter.scale=1", "loss.image=null", "loss.face=null"]
    config = saved(run / "config.yaml", aligned)
    plan = make_plan(config)
    model, perception = builder.build_model(config), builder.build_perception(config, plan)
    splits = _splits(run, model)
    trainee = builder.build_trainee(config, plan, model, perception)
    schedule, people = builder.build_schedule(config, plan), [p for p in plan.train if p.people and not p.names]
    scores = dict.fromkeys(components(splits), 0.0)
    for step in track(range(batches), "gradients by gates"):
        for parameter in trainee.adapter.parameters():
            parameter.grad = None
        training_step(trainee, draw_batches(people, schedule, step)[0])
        for component, value in gate_gradients(trainee.adapter, splits).items():
            scores[component] += abs(value) / batches
    sizes = components(splits)
    found = {"key": key, "components": [[*c, sizes[c], scores[c]] for c in sorted(sizes)]}
    write_json(path, found)
    return found


def _splits(run: Path, model: DiffusionModel) -> dict[Place, Split]:
    """The singular components of a run's LoRA; to be taken before an adapter is hung on the model."""
    modules = modules_of(model, "text_encoder") | modules_of(model, "unet")
    return split(read_lora(run / "adapter" / LORA_FILE, shapes_of(modules)))


def tables(found: dict) -> tuple[dict[Component, float], dict[Component, float]]:
    """Sizes and scores."""
    rows = [((part, layer, i), size, score) for part, layer, i, size, score in found["components"]]
    return {c: size for c, size, _ in rows}, {c: score for c, _, score in rows}


def measured(name: str, path: Path, settings: list[str], folder: Path) -> dict:
    """Of an adapter's audit what the page needs: by attribute the bias of every prompt before and after, and similarity."""
    audit = read_audit(audited(settings, saved_adapter(name, path), folder) / "audit.json")
    attributes = audit["models"]["after"]["attributes"]
    wanted = targeted(audit)
    return {
        "before": {a: prompt_biases(audit, "before", a) for a in wanted},
        "after": {a: prompt_biases(audit, "after", a) for a in wanted},
        "floor": {a: attributes[a]["bias"]["floor"] for a in wanted},
        "dino": audit["models"]["after"]["dino"]["mean"],
        "size": [audit["prompts"], audit["images_per_prompt"]],
    }


def measure(args: argparse.Namespace, kept_in: Path) -> dict:
    """Scores, sparse adapters and their audits; written into `kept_in` as soon as each is done."""
    folder = args.folder / "-".join(args.run.resolve().parts[-3:])
    found = scored(args.run, args.batches, folder)
    sizes, scores = tables(found)
    split_name = "test" if args.test else "validation"
    settings = [f"audit.split={split_name}", "audit.named=1", "audit.without_people=1", *args.set]
    record = {"run": args.run.as_posix(), "split": split_name, "settings": settings, "batches": args.batches}
    record |= {"components": found["components"], "points": {}}
    places = [("whole", 1.0, list(sizes))]
    for order, names in orders(sizes, scores, 0).items():
        places += [(order, share, first(names, share)) for share in SHARES]
    model = builder.build_model(saved(args.run / "config.yaml", []))
    splits = _splits(args.run, model)
    for order, share, chosen in track(places, "sparse adapters"):
        where = folder / "adapters" / f"{order}-{share:g}"
        with atomic_path(where) as temporary:
            temporary.mkdir()
            save_edit(temporary, kept(splits, chosen), model.kind)
        point = measured(f"{order} {share:g}", where, settings, folder / split_name)
        record["points"].setdefault(order, []).append({"share": share, "components": len(chosen)} | point)
        write_json(kept_in, record)
    if args.other is not None:
        others = tables(scored(args.other, args.batches, args.folder / "-".join(args.other.resolve().parts[-3:])))
        pair = [orders(*some, 0)["score"] for some in ((sizes, scores), others)]
        record["overlap"] = {"with": args.other.as_posix()} | {
            "rows": [[share, *overlap(*pair, share)] for share in SHARES[:-1]]
        }
        write_json(kept_in, record)
    return record


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a finished run with LoRA")
    parser.add_argument("--other", type=Path, metavar="RUN", help="another one, for the overlap of their parts")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of the scores; default: {BATCHES}")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="settings of the audits")
    parser.add_argument("--test", action="store_true", help="test prompts, for the final page")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "localize")
    add_place(parser)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    kept_in = record_of(args.docs, "localize")
    try:
        if args.run is None and not args.render:
            raise FairDiffError("run: found none, allowed: the folder of a finished run with LoRA, or --render")
        if not args.render:
            measure(args, kept_in)
        found = read_record(kept_in)
        made = page(found, shlex.join(["python", "scripts/localize.py", found["run"]]))
        report = publish(made, found, "localize", args.docs, args.folder)
    except (FairDiffError, OSError) as error:
        fail(error)
    print(f"report: {report}")


if __name__ == "__main__":
    main()
