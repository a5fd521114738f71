"""Compare finished audits, like the command fairdiff-compare.

python scripts/compare.py outputs/audit/gender               all audits below a folder, such as a sweep's
python scripts/compare.py outputs/a/seed0 outputs/b/seed0    some runs; differences are relative to the first
"""

from fairdiff.compare.command import main

if __name__ == "__main__":
    main()
