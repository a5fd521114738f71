"""Studies beside the method, one module for each: other ways to fairness, and what happens to a fair model later.

    words, edits -> baselines without training;  postprocess, curves, error_rates -> frontier;  drift, detectors;  localize

They stand on the public functions of the rooms below the builder. Nothing but scripts imports them;
`page` is that of `compare` too.
"""
