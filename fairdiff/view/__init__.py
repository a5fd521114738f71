"""The live page of a run folder: the progress of training, and images of any prompt with the adapter once it is saved.

    state (the folder as numbers) -> server -> page.html;  explorer (images without and with the adapter, classified)

It reads run folders and writes nothing. It imports the builder; only `start` imports it.
"""
