"""Audit a model, or a model with and without a saved adapter: images -> records -> audit.json -> report.

python scripts/audit.py audit=full                                                the embedded model
python scripts/audit.py adapter.path=outputs/gender/default/seed0/adapter         before and after (and adapter=<its kind>)
"""

from fairdiff.start import audit as task

if __name__ == "__main__":
    task()
