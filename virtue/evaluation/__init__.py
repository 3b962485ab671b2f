"""Evaluation: what is measured of a model, and how it is shown."""
from virtue import submodules

__getattr__ = submodules(__name__)
