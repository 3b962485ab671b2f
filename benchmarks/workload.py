"""What the benchmarks share: the workload's shapes, a random Mistral of that shape, clocks.

    PPO       32 prompts of 12 to 24 tokens, 48 new tokens, 4 epochs of one minibatch, LoRA rank 16
    rewards   pairs of 49 to 64 tokens, batches of 16 pairs
"""
from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
SHAPE = dict(hidden_size=128, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32,
             max_position_embeddings=512, sliding_window=None, rope_theta=1e6, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, EPOCHS = 32, 24, 48, 4
PPO = dict(kl_coef=0.05, clip_range=0.2, value_clip_range=0.2, vf_coef=0.1, gamma=1.0, lam=0.95,
           lr=1e-4, temperature=1.0)
PAIRS, PAIR_BATCH, PAIR_TOKENS, PAIR_LR = 256, 16, 64, 1e-4


def make_model(folder: Path, vocab_size: int = 1024) -> Path:
    """The folder of a random fp32 Mistral and a byte-level tokenizer, saved if it is not there."""
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(vocab_size=vocab_size, **SHAPE)).save_pretrained(folder)
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                            eos_token="</s>", padding_side="left",
                            chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] "
                            "}}{% if m['role'] == 'assistant' %}{{ eos_token }}"
                            "{% endif %}{% endfor %}").save_pretrained(folder)
    return folder


def prompts(n: int, vocab_size: int = 1024) -> list[list[int]]:
    """n prompts of ids; the first of eight is of full length: all padded batches are as wide."""
    rng = random.Random(0)
    return [[rng.randrange(3, vocab_size)
             for _ in range(PROMPT_TOKENS if i % 8 == 0 else rng.randrange(12, PROMPT_TOKENS + 1))]
            for i in range(n)]


def pairs() -> list[dict[str, list[int]]]:
    """Preference pairs of ids: the chosen one holds more of the lower half of the vocabulary."""
    rng, vocab_size, half = random.Random(0), 1024, 512
    def draw(low: int, high: int, k: int) -> list[int]:
        return [rng.randrange(low, high) if rng.random() < 0.7 else rng.randrange(3, vocab_size)
                for _ in range(k)]

    lengths = [PAIR_TOKENS - rng.randrange(0, 16) for _ in range(PAIRS)]
    return [{"chosen_ids": draw(3, half, k), "rejected_ids": draw(half, vocab_size, k)}
            for k in lengths]


def cpu_seconds(function, repeats: int) -> list[float]:
    """Processor seconds of each call (other jobs do not count), after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return times


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def alternate(programs: dict[str, list[str]], repeats: int) -> dict[str, list[dict]]:
    """What each program prints as its last line, JSON: all in turn, ``repeats`` times over."""
    found: dict[str, list[dict]] = {name: [] for name in programs}
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                        "TRL_EXPERIMENTAL_SILENCE": "1"}
    for repeat in range(repeats):
        for name, command in programs.items():
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                sys.exit(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  run {repeat + 1}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr)
    return found


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def ratio(top: list[float], bottom: list[float]) -> str:
    """The median of the ratios of neighbouring runs, with the smallest and the largest."""
    each = sorted(a / b for a, b in zip(top, bottom))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def scratch() -> Path:
    """A folder for models, kept between runs."""
    folder = Path(tempfile.gettempdir()) / "virtue-benchmarks"
    folder.mkdir(exist_ok=True)
    return folder
