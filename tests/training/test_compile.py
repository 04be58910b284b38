"""How often a training compiles, and a bf16 residual stream, on the CPU."""

from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support.models import LOOP, model_of
from tests.training.test_feed import text_tokenizer, write_codes
from tokenshuffle_core.training.distributed import residual_in, spread
from tokenshuffle_core.training.feed import Feed
from tokenshuffle_core.training.model import ModelTask
from tokenshuffle_core.training.settings import Recipe

CPU = torch.device("cpu")
COMPILED = replace(LOOP, compile=True, batch=4)


class Task(ModelTask):
    """On random codes, which are not from an image tokenizer."""

    def __init__(self, shards, windows, loop):
        self.recipe, self.device = Recipe(z_loss=1e-4), CPU
        self.feed = Feed(shards, text_tokenizer(), 60, windows, loop, self.recipe, CPU)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes"), 100)


def steps_of(shards) -> list[int]:
    """Two steps with short texts and two with long ones."""
    feed = Task(shards, (4,), COMPILED).feed
    by_length = defaultdict(list)
    for step in range(30):
        by_length[feed.draw(step).text.shape[1]].append(step)
    short, long, *_ = sorted(by_length.values(), key=len, reverse=True)
    return [*short[:2], *long[:2]]


@pytest.mark.parametrize(("layers", "checkpointing"), [(1, False), (4, True)])
def test_a_shape_costs_one_block(shards, monkeypatch, layers, checkpointing):
    """And the embedding of codes, their states, the head and the loss are compiled once for all
    texts. It computes what it did."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    module, plain = (model_of(4, layers=layers, window_head=8).train() for _ in range(2))
    task, other = (Task(shards, (4,), COMPILED) for _ in range(2))
    loop = replace(COMPILED, checkpointing=checkpointing)
    loss_of = spread(module, task, loop, torch.float32)
    for step in steps_of(shards):
        loss, expected = loss_of(step, 0, 1)[0], other.loss(plain, step)[0]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        expected.backward()
    assert counter.frame_count == 2 + 4
    for name, parameter in plain.named_parameters():
        found = module.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


def test_many_shapes_are_all_compiled(monkeypatch):
    """More than dynamo's usual limit, after which it compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    module = model_of(2, layers=1).train()

    class Lengths(Task):
        def __init__(self):
            pass

        def compile(self, module, compiled):
            pass

        def loss(self, module, step, piece, pieces):
            text = torch.ones(2, 2 + step, dtype=torch.int64)
            codes = torch.zeros(2, 4, 4, dtype=torch.int64)
            return module(text, torch.zeros(2, dtype=torch.int64), codes).codes.sum(), {}

    loss_of = spread(module, Lengths(), COMPILED, torch.float32)
    for step in range(10):
        loss_of(step, 0, 1)
    assert counter.frame_count == 10


def test_a_bf16_residual_stream_learns_the_same(shards):
    """The loss within 1 %, the gradient within 5 %."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bf16")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module = model_of(4, layers=4, window_head=8).train()
        task = Task(shards, (4,), LOOP)
        seen = []
        if dtype == torch.bfloat16:
            residual_in(dtype, list(module.transformer.blocks))
        for block in module.transformer.blocks:
            block.register_forward_hook(lambda *parts, seen=seen: seen.append(parts[-1].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = task.loss(module, 0)
        loss.backward()
        assert set(seen) == {dtype}
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in module.parameters()])))
    (exact, gradient), (loss, rough) = results
    assert loss == pytest.approx(exact, rel=0.01)
    assert (rough - gradient).norm() < 0.05 * gradient.norm()
