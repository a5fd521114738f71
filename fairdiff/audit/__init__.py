"""The audit: generate, measure, compute numbers with intervals, report. It shares only the sampler with the trainer."""
