"""The command line: what is typed becomes a Config, and whatever goes wrong one line.

    command_line (before Hydra) -> main (after it), messages, ending

With config the only room that knows Hydra and OmegaConf. The mains in jobs and in scripts import it.
"""
