"""Studies beside the method: baselines, comparisons of methods, and tests of trained adapters and of audits.

    words, edits -> baselines without training;  postprocess, curves, error_rates -> frontier;  drift, detectors;  localize

They use public functions of the packages below the builder. Only scripts import them, except `page`, which `compare` imports
too.
"""
