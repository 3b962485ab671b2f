"""virtue: guide a language model by virtue ethics, with AI feedback and PPO, in plain PyTorch.

The method, in the order in which it is best read:

    ethics.py      the words: virtues, lenses, constitution, the judge's questions
    lora.py        LoRA: named adapters that add up over one frozen base
    masked.py      means and variances under a mask
    logprobs.py    log-probs of sampled tokens, entropy, estimates of the KL divergence
    models.py      reading the base: hidden states, log-probs, the scalar head
    dialogue.py    the chat template: a dialogue as one sequence of tokens, its turns
    randomness.py  random numbers that belong to a name
    generate.py    sampling with a KV cache
    judge.py       AI feedback: which of two dialogues shows more virtue
    contrast.py    the same without a judge: one side is told to have a virtue, one a vice
    preference.py  the pairwise loss of the reward models, and their calibration
    ensemble.py    how three scores become one
    rollout.py     from sampled dialogues to rewards
    ppo.py         the objective: rewards with a KL penalty, GAE, the clipped losses

Around it, in folders of which the method imports nothing:

    plumbing/    what a run needs: flags, loading, artefacts on disk, the loop of supervised
                 training, resume, processes, the memory plan, export and upload
    evaluation/  what is measured of models, judge and reward models, and how it is shown
    toy/         the embedded world, in which true virtue is known
    real/        a real chat model that needs no hub, and prompts in English
"""

from importlib import import_module, util


def submodules(package: str):
    """A package's ``__getattr__``: ``virtue.ppo.gae`` imports virtue/ppo.py when it is first named,
    so that a script says where each function comes from, and --help needs no torch."""
    def __getattr__(name: str):
        if util.find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")
    return __getattr__


__getattr__ = submodules(__name__)

# The linear layers of a Mistral block: where LoRA goes unless told otherwise.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# How three scores become one (virtue/ensemble.py), here so that run_ppo.py --help needs no torch.
AGGREGATORS = ("mean", "weighted", "min", "uwo", "median", "lsc")


def printable(text: str) -> str:
    """`text` on one line for a terminal: control characters, bidi overrides among them, are shown,
    not sent."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


class VirtueError(Exception):
    """A mistake of input that one line explains: what is wrong, where, and the remedy.

    The scripts print it after ``error:`` and exit with status 2; it never shows a traceback. What
    it quotes of data cannot act on the terminal.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
