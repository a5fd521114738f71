"""Looks at faces: detection, differentiable crops, perceived-attribute judges, embeddings, calibration.

Knows images, not diffusion: everything here also works on a folder of JPEGs.
Labels are perceived presentation, never identity.
"""
