"""The live page of a run folder: the progress of training, and the saved adapter to try.

    state (the folder as numbers) -> server -> page.html;  explorer (both images of a prompt, as the audit judge reads them)

Reads run folders and writes nothing. Imports the builder; is imported by `start` only.
"""
