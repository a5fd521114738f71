"""The objective: the target distribution, and the losses that pull the generated one towards it.

    targets, target_files -> transport labels;  perception, features -> what images show;  losses, balance -> one gradient

Imports classifiers, errors and files; never training, never the loading of a diffusion model. `targets` needs no torch.
"""
