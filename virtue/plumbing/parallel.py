"""Several processes under torchrun: shares by index, sums over ranks. With one process, nothing
here has any effect.

Every rank holds the whole model and the whole batch's tokens; the work that costs time is shared
out by index, and the parts that a rank did not compute are zero until they are summed. So there is
one flat all-reduce of the adapters' gradients a step, losses are already normalised by the whole
step's tokens, and statistics over a batch are the same on every rank. Rank 0 writes. Text travels
as JSON; nothing is pickled.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from virtue import VirtueError

T = TypeVar("T")


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(device: torch.device) -> torch.device:
    """Joins the group that torchrun's environment names, if there is one -> this process's
    device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise VirtueError(f"process {number} of this machine finds {there} GPUs: give torchrun "
                              f"--nproc-per-node {there}, or --device cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # a long wait is no fault: one process may have hours of sampling left; torchrun ends them
        # all when one dies
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return device


def _wire() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every ``size()``-th, from its own number on."""
    return items[rank()::size()]


def total(tensor: Tensor) -> Tensor:
    """Sum over ranks of tensors of one shape, any device -> the same shape and device; the tensor
    itself where there is one process. RuntimeError: another rank died."""
    if size() == 1:
        return tensor
    wire = tensor.to(_wire(), copy=True)
    dist.all_reduce(wire)
    return wire.to(tensor.device)


def gather(items: Sequence) -> list:
    """The items of all ranks, each rank's from its `share`, in the order before sharing; as JSON
    gives them back."""
    if size() == 1:
        return list(items)
    text = bytearray(json.dumps(list(items)).encode())
    data = torch.frombuffer(text, dtype=torch.uint8).to(_wire())
    lengths = [torch.zeros(1, dtype=torch.long, device=_wire()) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=_wire()))
    most = max(int(n) for n in lengths)
    parts = [torch.zeros(most, dtype=torch.uint8, device=_wire()) for _ in range(size())]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, most - len(data))))
    lists = [json.loads(bytes(part[:int(n)].tolist())) for part, n in zip(parts, lengths)]
    return [lists[i % size()][i // size()] for i in range(sum(map(len, lists)))]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """One flat all-reduce: every rank then holds the gradient of the whole step. A rank without a
    share gives zeros. RuntimeError: as `total`."""
    if size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in trained)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    for p, gradient in zip(trained, total(flat).split([p.numel() for p in trained])):
        p.grad = gradient.view_as(p)


def barrier() -> None:
    """Waits for all ranks."""
    if size() > 1:
        total(torch.zeros(1))


def leave() -> None:
    """Ends the group. If a rank dies without this call, torchrun ends the others with an error."""
    if dist.is_initialized():
        barrier()  # a rank that leaves while another is still at work can make that one abort
        dist.destroy_process_group()
