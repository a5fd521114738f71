"""The audit: generate and measure images, compute numbers with intervals, report them. It imports nothing of the trainer."""
