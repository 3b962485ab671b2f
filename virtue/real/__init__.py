"""A small real chat model that needs no hub: SmolLM2-135M-Instruct, out of a package of PyPI.

No stage of the method knows of it: ``--model smollm2`` names a folder like any other.
"""
