"""Finished audits beside each other: any number of them in one table, on one page and in one picture.

    audits (find, settings, seeds) -> same (what compares) -> groups (over seeds) -> differences -> numbers -> table, page

Reads folders of audits and writes a comparison. Imports the audit; is imported by `start` and scripts only.
"""
