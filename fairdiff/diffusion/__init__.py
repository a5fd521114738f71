"""The generator: a text-to-image model, its sampler with a gradient, and the adapters trained in it.

    folder, single_file -> load -> denoise -> solvers -> sampling (and replay) -> adapters -> released
    lora_files, textual_inversion -> imports;  ldm -> export     files of other tools

Knows prompts, noise and latents, and nothing of faces, targets or configuration.
"""
