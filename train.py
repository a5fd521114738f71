"""Debias a text-to-image model and prove it: configuration -> train -> audit before and after -> report.

python train.py                                    five soft tokens, gender, uniform, on the embedded model
python train.py adapter=lora_text 'attribute=[gender,race]' target.gender.female=.7 target.gender.male=.3
python train.py audit=full seed=1                  every test occupation
"""

from pathlib import Path

from fairdiff import build, run
from fairdiff import plan as asked
from fairdiff.build_audit import build_audit
from fairdiff.cli import main
from fairdiff.config import Config
from fairdiff.training.tracking import make_console
from fairdiff.training.trainer import train


def job(config: Config, folder: Path) -> None:
    console = make_console()
    prompts = asked.prompts(config, "train")
    model, judges = build.build_model(config), build.build_judges(config)
    training = build.training_fingerprint(config, model, judges, prompts)
    audit = build_audit(config, model, training, judges.classifier)
    run.check(folder, config, training)

    if run.finished(folder, config, training, audit):
        console.print(f"this run is finished; resume=false starts over ({folder})")
    else:
        trainee = build.build_trainee(config, model, judges)
        run.begin(folder, config, training)
        run.print_budget(config, trainee, prompts, audit, console)
        run.warn_about_prompts(model, trainee.adapter.prefix, prompts, audit.plan.prompts, console)
        train(trainee, prompts, build.build_schedule(config), folder, training, console)
        run.save_adapter(folder, config, training, trainee)
        run.audit(folder, config, training, run.painters(config, model, trainee.adapter), audit, console)
    run.conclude(folder, console)


task = main(job)

if __name__ == "__main__":
    task()
