"""Face analysis: detection, differentiable crops, classifiers of perceived attributes (judges), embeddings, calibration.

It needs no diffusion model: everything here also works on a folder of image files.
Labels are perceived presentation, never identity.
"""
