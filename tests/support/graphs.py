"""CUDA graphs on a CPU: the operations of a function, recorded once, repeated on the same memory.

As on a GPU, a repetition knows nothing of the host's numbers at that time, and a question to the
device during the capture is an error.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenshuffle_core.engine import cuda_graphs
from tokenshuffle_core.engine.cuda_graphs import CapturedSteps, StaticCache

QUESTIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


class Recording(TorchDispatchMode):
    """Runs operations and records them, with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.name().split(".")[0] in QUESTIONS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*arguments, **(keywords or {}))
        self.operations.append((function, arguments, keywords or {}, result))
        return result

    def replay(self) -> None:
        with torch.inference_mode():
            for function, arguments, keywords, result in self.operations:
                again = function(*arguments, **keywords)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class EmulatedSteps(CapturedSteps):
    """`CapturedSteps` whose device is the CPU."""

    def _capture(self, model, count: int) -> Callable[[], None]:
        decoding, cache = self.decoding, self.decoding.cache
        written = [decoding.codes, decoding.done, decoding.logits, self.finished, cache.position]
        written += [*cache.keys, *cache.values]
        before = [tensor.clone() for tensor in written]
        with Recording() as recording:
            self._step(model, count)
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)  # a capture runs nothing
        return recording.replay

    def _mark(self) -> Callable[[], None]:
        return lambda: None


@contextmanager
def emulated(monkeypatch, kind: type[EmulatedSteps] = EmulatedSteps):
    """In here, the engine's steps on a CPU are graphs. Yields the list of those that were made."""
    made = []

    def steps(model, shape, pace, new):
        kept = cuda_graphs.take(model, shape, pace)
        if kept is None:
            kept = kind(new(StaticCache), pace)
            made.append(kept)
        return kept

    with monkeypatch.context() as patch:
        patch.setattr("tokenshuffle_core.engine.steps", steps)
        yield made
