"""Compare any number of finished audits: a table, a page and a chart.

    audits (find, settings, seeds) -> same (what compares) -> groups (over seeds) -> differences -> numbers -> table, page

Reads folders of audits and writes a comparison. Imports the audit; is imported by `start` and scripts only.
"""
