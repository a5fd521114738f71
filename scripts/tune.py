"""Search settings for little bias and little drift with Optuna; repeat an interrupted command to continue it.

python scripts/tune.py outputs/tune --trials 20 --vary 'adapter.learning_rate=log(1e-3,3e-2)' 'loss.image=linear(.1,1)' \\
    'adapter.rank=choice(4,8)' --fix adapter=lora_text steps=60                   needs pip install 'fairdiff[sweep]'

Every trial is a run of train.py, audited on validation prompts. Bias is the mean distance to the target over the attributes
with a target. Drift is 1 - the mean cosine to the reference images over CLIP and the image encoder. study.jsonl in the
folder holds the trials. An interrupted trial is continued first, from its run's last checkpoint.
"""

import argparse
import re
from pathlib import Path
from statistics import fmean

import fairdiff
from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import distance_of, last_model
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError
from fairdiff.lock import locked

SPACE = re.compile(r"([\w.@]+)=(log|linear|choice)\(([^()]+)\)")


def read_space(texts: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Parse --vary arguments into key -> (kind, its arguments)."""
    space = {}
    for text in texts:
        found = SPACE.fullmatch(text)
        words = [word.strip() for word in found[3].split(",")] if found else []
        if not found or (found[2] != "choice" and (len(words) != 2 or float(words[0]) >= float(words[1]))):
            allowed = "key=log(low,high), key=linear(low,high) or key=choice(a,b,...)"
            raise FairDiffError(f"--vary: found {text}, allowed: {allowed}")
        space[found[1]] = (found[2], words)
    return space


def suggested(trial, space: dict[str, tuple[str, list[str]]]) -> list[str]:
    """Return the overrides of a trial."""
    found = []
    for key, (kind, words) in space.items():
        if kind == "choice":
            value = trial.suggest_categorical(key, words)
        else:
            value = trial.suggest_float(key, float(words[0]), float(words[1]), log=kind == "log")
        found.append(f"{key}={value}")
    return found


def objectives(run: Path) -> tuple[float, float]:
    """Return (bias, drift) of a run's newest audit. FairDiffError if they are undefined, as without any face."""
    path = max(run.glob("audits/*/audit.json"), key=lambda file: file.stat().st_mtime)
    after = last_model(read_audit(path))
    targeted = [entry for entry in after["attributes"].values() if entry["target"]["requested"]]
    bias, kept = [distance_of(e)["mean"] for e in targeted], [after[key]["mean"] for key in ("clip_i", "dino")]
    if None in [*bias, *kept]:
        raise FairDiffError(f"{path}: bias or drift is undefined there")
    return fmean(bias), 1 - fmean(kept)


def open_study(folder: Path, seed: int):
    """Open the study in a folder. Trials that a killed process left running are queued again with their settings."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.jsonl")))
    study = optuna.create_study(
        storage=storage, study_name="fairdiff", directions=["minimize", "minimize"], load_if_exists=True
    )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # the same seed would repeat earlier draws
    return study


def tune(folder: Path, space: dict, fixed: list[str], trials: int, seed: int) -> list[str]:
    """Run trials until `trials` are finished, and return a line for each Pareto-optimal one."""
    from optuna.trial import TrialState

    with locked(folder):
        study = open_study(folder, seed)
        while len(study.get_trials(states=(TrialState.COMPLETE,))) < trials:
            trial = study.ask()
            overrides = ["audit.split=validation", *fixed, *suggested(trial, space)]
            run = fairdiff.train(overrides)
            trial.set_user_attr("run", str(run))
            bias, drift = objectives(run)
            study.tell(trial, (bias, drift))
            print(f"trial {trial.number}: bias {bias:.3f}, drift {drift:.3f}: {' '.join(overrides)}", flush=True)
    best = sorted(study.best_trials, key=lambda t: t.values)
    return [f"bias {t.values[0]:.3f}, drift {t.values[1]:.3f}: {t.user_attrs['run']}" for t in best]


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("--vary", nargs="+", required=True, metavar="KEY=log(LOW,HIGH)", help="also linear, choice")
    parser.add_argument("--fix", nargs="*", default=[], metavar="OVERRIDE", help="other settings of every run")
    parser.add_argument("--trials", type=int, default=20, help="finished ones in all")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    args = parser.parse_args(argv)
    try:
        for line in tune(args.folder, read_space(args.vary), args.fix, args.trials, args.seed):
            print(line)
    except ModuleNotFoundError as error:
        fail(FairDiffError(f"{error.name} is not installed, allowed: pip install 'fairdiff[sweep]'"))
    except (FairDiffError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
