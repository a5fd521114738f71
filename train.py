"""Debias a text-to-image model and prove it: configuration -> train -> audit before and after -> report.

python train.py                                    five soft tokens, gender, uniform, on the embedded model
python train.py adapter=lora_text 'attribute=[gender,race]' target.gender.female=.7 target.gender.male=.3
python train.py audit=full seed=1                  every test occupation
"""

from pathlib import Path

from fairdiff import build, run
from fairdiff.config import Config, main
from fairdiff.tracking import make_console
from fairdiff.trainer import train


@main
def task(config: Config, folder: Path) -> None:
    console = make_console()
    run.prepare(folder, config)
    if run.finished(folder, config):
        console.print(f"this run is finished; resume=false starts over ({folder})")
        run.conclude(folder, config, console)
        return

    prompts = build.build_prompts(config, "train")
    model, judges = build.build_model(config), build.build_judges(config)
    audit = build.build_audit(config, model, judges.classifier)
    trainee = build.build_trainee(config, model, judges)
    run.print_budget(config, trainee, prompts, audit, console)

    train(trainee, prompts, build.build_schedule(config), folder, build.run_fingerprint(config), console)
    run.save_adapter(folder, config, trainee)
    run.audit(folder, config, run.painters(config, model, trainee.adapter), audit, console)
    run.conclude(folder, config, console)


if __name__ == "__main__":
    task()
