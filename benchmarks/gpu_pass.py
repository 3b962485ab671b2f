"""Where the time of a forward and backward pass goes, at Mistral-7B's widths, on random weights.

  python benchmarks/gpu_pass.py --out runs/pass                             # a GPU: a minute
  python benchmarks/gpu_pass.py --out runs/pass --shape small --device cpu  # does it run?

Prints seconds of the policy's pass (8 dialogues of 668 tokens, layers recomputed), of a pass
without gradient under none, one and two adapters, and the GPU's kernels by time. Then the same with
LoRA's narrow products in the base's type instead of fp32: how much the casts cost.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import torch
import torch.nn.functional as F

sys.path.insert(0, str(gpu.ROOT))
from virtue.lora import LoRALinear, adapter_parameters, add_adapter, use_stack
from virtue.models import checkpoint_layers, logprobs_at
from virtue.plumbing.loading import load_model

SIZES = {"7b": (8, 668, 384), "small": (2, 64, 24)}  # rows, tokens a row, sampled tokens a row


def plain_in_base_type(self: LoRALinear, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """`LoRALinear.plain` without fp32: for timing only."""
    output = self.base(x)
    for name in names:
        h = F.linear(x, self.lora_A[name].to(x.dtype)) * self.scaling[name]
        output = output + F.linear(h, self.lora_B[name].to(x.dtype))
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--shape", choices=SIZES, default="7b", help="small: to see that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=8, help="of the 7b shape's 32")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    layers = args.layers if args.shape == "7b" else 2
    gpu.SHAPES["pass"] = gpu.SHAPES[args.shape] | {"num_hidden_layers": layers}
    folder = args.out / f"model-{args.shape}-{layers}"
    folder.mkdir(parents=True, exist_ok=True)
    gpu.make_weights(SimpleNamespace(args=SimpleNamespace(shape="pass"), model=folder,
                                     device=args.device))
    dtype = "bf16" if cuda else "fp32"
    model = load_model(folder, quantize="nf4", dtype=dtype, device=args.device)
    for seed, name in enumerate(("sft", "policy")):
        add_adapter(model, name, rank=16, alpha=32, seed=seed)
    for parameter in adapter_parameters(model, "sft"):
        parameter.requires_grad_(False)
    checkpoint_layers(model)
    rows, width, new = SIZES[args.shape]
    ids = torch.randint(300, model.config.vocab_size, (rows, width), device=args.device)
    attention = torch.ones_like(ids)
    mask = torch.zeros(rows, width - 1, dtype=torch.bool, device=args.device)
    mask[:, -new:] = True

    def learn() -> None:
        with use_stack(model, "sft", "policy"):
            logprobs, _ = logprobs_at(model, ids, attention, mask, with_entropy=True)
            logprobs.sum().backward()

    @torch.no_grad()
    def read(*stack: str) -> None:
        with use_stack(model, *stack):
            logprobs_at(model, ids, attention, mask)

    def seconds(function, repeats: int = 2) -> float:
        function()  # warms up
        wait = torch.cuda.synchronize if cuda else (lambda: None)
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        return (time.perf_counter() - start) / repeats

    print(f"{layers} layers, {rows} x {width} tokens, {dtype}")
    for title, path in (("adapters in fp32", LoRALinear.plain),
                        ("adapters in the base's type", plain_in_base_type)):
        LoRALinear.plain = path
        reads = [seconds(lambda stack=stack: read(*stack)) for stack in ((), ("sft",),
                                                                         ("sft", "policy"))]
        print(f"{title}: forward and back {seconds(learn):.3f} s; forward under none, one and two "
              f"adapters {', '.join(f'{s:.3f}' for s in reads)} s")
        if cuda:
            kernels(learn)


def kernels(function, most: int = 20) -> None:
    """The GPU's kernels in one call, by time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    found = [e for e in record.key_averages() if e.device_type == DeviceType.CUDA]
    found.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in found) / 1e3
    print(f"  busy {busy:.1f} ms in {sum(event.count for event in found)} kernels")
    for event in found[:most]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms {event.count:5} {event.key[:70]}")


if __name__ == "__main__":
    main()
