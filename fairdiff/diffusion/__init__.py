"""The generator: a text-to-image diffusion model, its sampler, the replay that gives a gradient, and the adapters.

    folder, single_file -> load -> denoise -> solvers -> sampling (and replay) -> adapters -> released
    lora_files, textual_inversion -> imports;  ldm -> export     formats of other tools

This package handles prompts, noise and latents. It uses neither faces nor targets nor the configuration.
"""
