"""The objective: the requested distribution, and the losses that pull the generated distribution towards it.

    targets, target_files -> transport labels;  perception, features -> faces and features;  losses, balance -> gradients

It imports classifiers, errors and files. It imports neither training nor the loading of a diffusion model. `targets`
needs no torch.
"""
