"""Training: one step, the loop around it, and the loop's state.

    originals -> step -> update -> trainer;  validation, checkpoint, tracking

Imports diffusion and objective; is imported by the builder and the mains only.
"""
