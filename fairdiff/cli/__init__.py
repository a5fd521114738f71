"""The command line: it turns arguments into a Config, and every error into one line.

    command_line (before Hydra) -> main (after it), messages, ending

With config the only room that knows Hydra and OmegaConf. The mains in jobs and in scripts import it.
"""
