"""The live page of a run folder: what training says while it goes on, and the adapter to try once it is saved.

    state (the folder as numbers) -> server -> page.html;  explorer (both images of a prompt, as the audit judge reads them)

Reads run folders and writes nothing. Imports the builder; is imported by `start` only.
"""
