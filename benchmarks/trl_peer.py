"""The peer: TRL's PPOTrainer or RewardTrainer on workload.py,
run by TRL's own interpreter (see ppo_step.py, rm_step.py).

With --folder, --rows and so on PPO on another model and workload, by the wall clock (see gpu.py);
with --device cuda in bf16, with CUDA's peak memory.
"""
from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from workload import (
    ALPHA,
    EPOCHS,
    NEW_TOKENS,
    PAIR_BATCH,
    PAIR_LR,
    PPO,
    PROMPTS,
    RANK,
    TARGETS,
    make_model,
    pairs,
    peak_mib,
    prompts,
    resident_mib,
    scratch,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("ppo", "rm"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--value", choices=("full", "lora"), default="full",
                        help="TRL's value model: trained whole, or by LoRA")
    parser.add_argument("--folder", type=Path, help="another model than the workload's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=PROMPTS, help="PPO: prompts a step")
    parser.add_argument("--micro", type=int, default=PROMPTS,
                        help="PPO: rows a forward pass of the update; --rows are a multiple")
    parser.add_argument("--prompt-tokens", type=int, help="PPO: tokens of every prompt")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    import datasets
    import peft
    import torch
    import transformers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import RewardConfig, RewardTrainer
    if args.stage == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

    if not cuda:
        torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    imports = resident_mib()

    class Clock(TrainerCallback):
        def __init__(self):
            self.at = []

        def on_train_begin(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            self.at.append(time.perf_counter() if args.folder else time.process_time())

        on_step_end = on_train_begin

    clock, folder = Clock(), args.folder or make_model(scratch() / "v1024")
    dtype = torch.bfloat16 if cuda else torch.float32
    lora = dict(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
    def classifier():
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as out:
        common = dict(output_dir=out, use_cpu=not cuda, bf16=False, gradient_checkpointing=False,
                      report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
                      logging_steps=1)
        if args.stage == "rm":
            trainer = RewardTrainer(
                model=classifier(), processing_class=tokenizer, callbacks=[clock],
                train_dataset=datasets.Dataset.from_list(pairs()),
                args=RewardConfig(**common, per_device_train_batch_size=PAIR_BATCH,
                                  max_steps=args.steps, learning_rate=PAIR_LR, max_length=None),
                peft_config=peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora))
        else:
            value = classifier()
            if args.value == "lora":
                value = peft.get_peft_model(
                    value, peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora))
            rng = random.Random(0)
            rows = [[rng.randrange(3, 1024) for _ in range(args.prompt_tokens)]
                    for _ in range(args.rows * 4)] if args.prompt_tokens else prompts(args.rows * 4)
            data = datasets.Dataset.from_dict({"input_ids": rows})
            trainer = PPOTrainer(
                args=PPOConfig(**common, per_device_train_batch_size=args.micro,
                               gradient_accumulation_steps=args.rows // args.micro,
                               num_mini_batches=1, num_ppo_epochs=EPOCHS,
                               total_episodes=args.rows * args.steps,
                               response_length=args.new_tokens,
                               local_rollout_forward_batch_size=args.rows, num_sample_generations=0,
                               temperature=PPO["temperature"], kl_coef=PPO["kl_coef"],
                               cliprange=PPO["clip_range"], vf_coef=PPO["vf_coef"],
                               cliprange_value=PPO["value_clip_range"], gamma=PPO["gamma"],
                               lam=PPO["lam"], learning_rate=PPO["lr"]),
                processing_class=tokenizer,
                model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), ref_model=None,
                reward_model=classifier().requires_grad_(False), value_model=value,
                train_dataset=data, eval_dataset=data.select(range(8)), callbacks=[clock],
                peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        trainer.train()
    held = {p.data_ptr(): p.numel() for o in gc.get_objects() if isinstance(o, torch.nn.Module)
            for p in o.parameters(recurse=False)}
    steps = [b - a for a, b in zip(clock.at, clock.at[1:])]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_mib() - imports
    print(json.dumps({"step": statistics.median(steps[1:]), "peak_mib": peak,
                      "parameters": sum(held.values())}))


if __name__ == "__main__":
    main()
