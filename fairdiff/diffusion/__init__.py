"""The generator: a Stable Diffusion model, its sampler with a gradient, and what is trained in it.

    folder -> load -> denoise -> solvers -> sampling (and replay) -> adapters -> released

Knows prompts, noise and latents, and nothing of faces, targets or configuration.
"""
