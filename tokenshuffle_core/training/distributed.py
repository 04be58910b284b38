"""One training in many processes: the group that `torchrun` starts, the messages between its
processes, and how a module is compiled, checkpointed and distributed.

Messages between steps go over gloo, on the CPU, so that no GPU waits for them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..transformer import Block
from .settings import LoopConfig

SHAPES = 256  # that are compiled at most: sizes x windows x lengths of text
TIMEOUT = timedelta(hours=1)  # the others wait while process 0 validates and draws a sheet


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the group of processes if `torchrun` started this one, and yields its device.

    With CUDA that is the GPU with the number of the process on this machine. Raises ValueError
    where there is no such GPU, or `device` is neither CUDA nor the CPU.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"torchrun can train on cuda or cpu, not on {device.type}: add --device cpu"
        )
    backend = "gloo"
    if device.type == "cuda":
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise ValueError(
                f"torchrun started process {index + 1} on a machine with {count} GPUs: use "
                f"--nproc-per-node {count}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    yield device
    # Not after an error: the other processes may be waiting for this one, and torchrun ends them.
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def in_any(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process; the same in all of them."""
    counts = torch.tensor(flags, dtype=torch.int64)
    _all_reduce(counts)
    return (counts > 0).tolist()


def mean_of_all(values: dict[str, float | torch.Tensor]) -> dict[str, float]:
    """The mean of each value over all processes."""
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    _all_reduce(sums)
    return dict(zip(values, (sums / world_size()).tolist(), strict=True))


def max_of_all(tensor: torch.Tensor) -> None:
    """Replace each element, in place, by its maximum over all processes."""
    _all_reduce(tensor, dist.ReduceOp.MAX)


def from_first(*values: float) -> list[float]:
    """The values of process 0, in every process."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if rank() > 0:
        tensor.zero_()
    _all_reduce(tensor)
    return tensor.tolist()


def barrier() -> None:
    """Wait until every process has called this."""
    in_any(False)


def _all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    global _latest
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
        _latest = tensor


# Gloo's thread releases a tensor a moment after the others have it. If it were the last owner then,
# it would ask for the GIL, which aborts the process while the interpreter shuts down.
_latest: torch.Tensor | None = None


class _Loss(nn.Module):
    """A task's loss as the forward of one module, because DDP and FSDP hook into forward.

    The task gets the plain module and may call any of its methods.
    """

    def __init__(self, module: nn.Module, task):
        super().__init__()
        self.module = module
        self.task = task

    def forward(self, step: int, piece: int, pieces: int):
        return self.task.loss(self.module, step, piece, pieces)


def spread(module: nn.Module, task, config: LoopConfig, dtype: torch.dtype) -> nn.Module:
    """A module that computes `task.loss(module, step, piece, pieces)` on all processes together.

    The config's `compile` and `checkpointing` change each transformer block of `module` in place
    (`compile` each child of a module without blocks, and what `task.compile` names); the weights
    keep their names. On a GPU the sum of embeddings enters the blocks in `dtype`. `shard` replaces
    the weights by shards (FSDP's fully_shard, arXiv 2304.11277), which are gathered in `dtype` for
    one block at a time; otherwise every process holds all weights (DDP, arXiv 2006.15704). In one
    process there is nothing to shard. Raises ValueError for `checkpointing` or `shard` on a module
    without blocks.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for name in ("checkpointing", "shard"):
        if getattr(config, name) and not blocks:
            raise ValueError(
                f"{name} needs transformer blocks, and {type(module).__name__} has none: leave it "
                "out"
            )
    if next(module.parameters()).device.type == "cuda":
        residual_in(dtype, blocks)
    if config.compile:
        _compile(module, task, blocks)
    if config.checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    loss = _Loss(module, task)
    if world_size() == 1:
        return loss
    if config.shard:
        # The rotary angles stay float32.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mp_policy=replace(exact, param_dtype=dtype))
        fully_shard(loss, mp_policy=exact)
        return loss
    return DistributedDataParallel(
        loss, find_unused_parameters=task.idle_parameters, gradient_as_bucket_view=True
    )


def residual_in(dtype: torch.dtype, blocks: list[Block]) -> None:
    """Let the sum of embeddings enter the `blocks` in `dtype`, in which each adds to it: half the
    memory traffic in bf16. Norms compute in float32 anyway."""
    for block in blocks[:1]:
        block.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def _compile(module: nn.Module, task, blocks: list[Block]) -> None:
    """For static shapes, which are faster; each shape of a batch costs one block, not all of them,
    because all blocks call one compiled function."""
    from torch._dynamo import config as dynamo  # slow

    # Beyond its limit nothing is compiled any more; torch 2.6 has the second name.
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, max(SHAPES, getattr(dynamo, limit)))
    compiled = partial(torch.compile, dynamic=False)
    if blocks:
        forward = compiled(Block.forward)
        for block in blocks:
            block.forward = partial(forward, block)
    else:
        for part in module.children():
            part.forward = compiled(part.forward)
    task.compile(module, compiled)
