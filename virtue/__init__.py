"""virtue: guide a language model by virtue ethics, with AI feedback and PPO, in plain PyTorch."""


class VirtueError(Exception):
    """A mistake of input that one line explains: what is wrong, where, and the remedy.

    The scripts print it after ``error:`` and exit with status 2; it never shows a traceback.
    """
