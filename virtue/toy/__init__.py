"""The embedded toy world: a grammar of moral situations, its gold standard, its tiny Mistral.

No stage of the method reads this package but for the prompts and, in the evaluation, gold.
"""
