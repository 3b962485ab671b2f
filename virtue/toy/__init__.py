"""The embedded toy world: a grammar of moral situations, its gold standard, its tiny Mistral.

No stage of the method learns from this package but for its prompts: gold is only reported.
"""
