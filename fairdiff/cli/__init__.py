"""The command line: turn the arguments into a Config, and every error into one line.

    command_line (before Hydra) -> main (after it), messages, ending

Only this package and config use Hydra and OmegaConf. The main functions in jobs and in scripts import it.
"""
