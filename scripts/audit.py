"""Measure a model, or a model and a saved adapter, without training: pictures -> records -> audit.json -> report.

python scripts/audit.py audit=full                                            the embedded model
python scripts/audit.py adapter.path=outputs/debias/default/seed0/adapter     before and after (LoRA: adapter=lora_...)
"""

from pathlib import Path

from fairdiff import build, run
from fairdiff.build_audit import build_audit
from fairdiff.cli import main
from fairdiff.config import Config
from fairdiff.training.tracking import make_console


def job(config: Config, folder: Path) -> None:
    console = make_console()
    model = build.build_model(config)
    adapter_hash = build.adapter_fingerprint(config)
    audit = build_audit(config, model, adapter_hash, None)
    measured = model.fingerprint() + str(adapter_hash)
    run.check(folder, config, measured)

    if run.finished(folder, config, measured, audit):
        console.print(f"this audit is finished; resume=false starts over ({folder})")
    else:
        adapter = build.build_adapter(config, model) if config.adapter.path else None
        if adapter:
            run.warn_about_adapter(config, console)
        run.warn_about_prompts(model, adapter.prefix if adapter else "", [], audit.plan.prompts, console)
        run.begin(folder, config, measured)
        run.audit(folder, config, measured, run.painters(config, model, adapter), audit, console)
    run.conclude(folder, console)


if __name__ == "__main__":
    main(job, "measure")()
