"""Studies beside the method: other ways to the same end, and what becomes of a fair model. One module a question.

    words, edits -> baselines without training;  postprocess, curves, error_rates -> frontier;  drift, detectors;  localize

They stand on the public functions of the rooms below the builder. Nothing but scripts imports them;
`page` is that of `compare` too.
"""
