"""Finished audits beside each other: the command fairdiff-compare.

python scripts/compare.py outputs/audit/gender               every audit below a folder, such as a sweep's
python scripts/compare.py outputs/a/seed0 outputs/b/seed0    some runs; the differences are to the first
"""

from fairdiff.compare.command import main

if __name__ == "__main__":
    main()
