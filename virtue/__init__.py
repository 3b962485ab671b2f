"""virtue: guide a language model by virtue ethics, with AI feedback and PPO, in plain PyTorch.

Core: names and errors that everything may import.
"""

# The linear layers of a Mistral block: where LoRA goes unless told otherwise.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# How three scores become one (virtue/ensemble.py), here so that run_ppo.py --help needs no torch.
AGGREGATORS = ("mean", "weighted", "min", "uwo", "median", "lsc")


def printable(text: str) -> str:
    """`text` on one line for a terminal: control characters, bidi overrides among them, are shown, not sent."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


class VirtueError(Exception):
    """A mistake of input that one line explains: what is wrong, where, and the remedy.

    The scripts print it after ``error:`` and exit with status 2; it never shows a traceback. What it
    quotes of data cannot act on the terminal.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
