"""Measure a model, or a model and a saved adapter, without training: images -> records -> audit.json -> report.

python scripts/audit.py audit=full                                                the embedded model
python scripts/audit.py adapter.path=outputs/gender/default/seed0/adapter         before and after (adapter=... of its kind)
"""

from fairdiff.start import audit as task

if __name__ == "__main__":
    task()
