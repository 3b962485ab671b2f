"""Plumbing: what a run needs around the method, from flags to files."""
from virtue import submodules

__getattr__ = submodules(__name__)
