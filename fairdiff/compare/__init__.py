"""Compare any number of finished audits in a table, on a page and in a picture.

    audits (find, settings, seeds) -> same (checks) -> groups (over seeds) -> differences -> numbers -> table, page

It reads folders of audits and writes a comparison. It imports the audit; only `start` and scripts import it.
"""
