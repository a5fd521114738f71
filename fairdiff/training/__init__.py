"""Training: one step, the training loop, and the files that the loop writes.

    originals -> step -> update -> trainer;  validation, checkpoint, tracking

It imports diffusion and objective. Only the builder and the mains import it.
"""
