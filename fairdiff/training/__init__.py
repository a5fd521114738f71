"""Training: one step, the loop around it, and what the loop keeps.

    originals -> step -> update -> trainer;  validation, checkpoint, tracking

Imports diffusion and objective; is imported by the builder and the mains only.
"""
