"""Measure a model, or a model and a saved adapter, without training: pictures -> records -> audit.json -> report.

    python scripts/audit.py audit=full                                            the embedded model
    python scripts/audit.py adapter.path=outputs/debias/default/seed0/adapter     before and after an adapter
"""

from pathlib import Path

from fairdiff import build, run
from fairdiff.config import Config, main
from fairdiff.tracking import make_console


def task(config: Config, folder: Path) -> None:
    console = make_console()
    run.prepare(folder, config)
    if run.finished(folder, config):
        console.print(f"this audit is finished; resume=false starts over ({folder})")
    else:
        model = build.build_model(config)
        audit = build.build_audit(config, model)
        adapter = build.build_adapter(config, model) if config.adapter.path else None
        run.audit(folder, config, run.painters(config, model, adapter), audit, console)
    run.conclude(folder, config, console)


if __name__ == "__main__":
    main(task, "measure")()
