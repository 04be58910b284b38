"""What a GPU draws, against a CPU and against the plain loop: `pytest -m gpu`."""

import gc
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import dequantized, model_of
from tokenshuffle_core import engine
from tokenshuffle_core.config import WEIGHT_KINDS, GenerationConfig
from tokenshuffle_core.engine import cuda_graphs
from tokenshuffle_core.engine.quantize import quantize, rounds_activations
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.sampler import sample

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
PROMPTS = ("a red apple", "a fox, flat style", "three dogs on blue")


def codes_of(loaded: Pipeline, prompt: str = PROMPTS[0], seeds=(0,), changes=(), **more):
    settings = replace(loaded.config.generation, **dict(changes))
    prompts = [loaded.encode_prompt(prompt)] * len(seeds)
    *_, last = loaded.sample(prompts, [], settings, list(seeds), **more)
    return last.codes.cpu()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_codes_of_a_cpu(prompt):
    """Greedy, in float32: noise is another on each device. A code that follows another one is
    another as well, so that one in a hundred is many."""
    greedy = {"temperature": 0.0}
    expected = codes_of(load(dtype=torch.float32), prompt, changes=greedy)
    found = codes_of(load(device=GPU, dtype=torch.float32), prompt, changes=greedy)
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("kind", [None, *WEIGHT_KINDS])
@pytest.mark.parametrize("ahead", [1, 8])
def test_every_kind_of_weights_draws_the_picture_of_the_plain_loop(kind, ahead):
    """Where the plain loop rounds activations, with the weights that the small ones stand for."""
    loaded = load(device=GPU, dtype=torch.float32)
    if kind:
        quantize(loaded.model, kind)
    plain = replace(loaded, model=dequantized(loaded.model))
    expected = codes_of(plain, engine=False)
    rounds = rounds_activations(loaded.model, GPU)  # the prompt, also with the kernels
    engine.prepare(loaded.model, GPU)
    if rounds_activations(loaded.model, GPU):
        pytest.skip("without Triton's kernels this kind rounds activations")
    if rounds:
        expected = codes_of(loaded, ahead=1)
    found = codes_of(loaded, ahead=ahead)
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_picture_of_a_batch_is_that_of_its_seed(dtype):
    loaded = load(device=GPU, dtype=dtype)
    batch = codes_of(loaded, seeds=(5, 6, 7))
    for i, codes in enumerate(batch):
        alone = codes_of(loaded, seeds=(5 + i,))
        assert (alone[0] == codes).float().mean() > 0.9


def test_the_same_seed_draws_the_same_picture():
    loaded = load(device=GPU)
    first = codes_of(loaded, seeds=(3,))
    codes_of(loaded, PROMPTS[1], seeds=(4,))
    assert torch.equal(codes_of(loaded, seeds=(3,)), first)
    assert torch.equal(codes_of(load(device=GPU), seeds=(3,)), first)


def test_pictures_leave_nothing_in_memory():
    loaded = load(device=GPU)
    codes_of(loaded)  # libraries keep workspaces
    engine.release(loaded.model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    used = []
    for seed in range(12):
        codes_of(loaded, PROMPTS[seed % 3], seeds=(seed,))
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[4]
    # The graphs of a step have some memory of their own beside what the engine counts.
    assert 0 < engine.packed_nbytes(loaded.model) <= used[-1] - before
    engine.release(loaded.model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


GRAPHS_COME_AND_GO = """
import torch
from tests.engine.test_cuda_graphs import codes_of
from tests.support.models import dequantized, model_of
models = [model_of(window).cuda() for window in (1, 2)]
grids = (5, 6), (7, 6), (5, 6)
def codes(model, grid, **more):
    return codes_of(model, grid=grid, device="cuda", **more)[1]
expected = [[codes(model, grid, engine=False) for model in models] for grid in grids]
for grid, codes_then in zip(grids, expected):
    for _ in range(2):
        for model, then in zip(models, codes_then):
            assert torch.equal(codes(model, grid, ahead=1), then)
            torch.cuda.empty_cache()
"""


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_graphs_of_two_models(backend):
    """Those of one are freed while the other's stay, with the allocator that ComfyUI chooses as
    well; without Triton's kernels, so that PyTorch's libraries have workspaces."""
    code = "import tokenshuffle_core.engine as e; e._gpu_layers = lambda device: None\n"
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{backend}"}
    subprocess.run(
        [sys.executable, "-c", code + GRAPHS_COME_AND_GO],
        cwd=Path(__file__).parents[1],
        env=environment,
        check=True,
        timeout=100,
    )


class Fetched(nn.Linear):
    """Its weight stays in main memory, as a host with a small GPU may have it."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.device), None)


def test_weights_in_main_memory(caplog, monkeypatch):
    model = model_of(2).to(GPU)
    settings = GenerationConfig(cfg=3.0, temperature=0.7)

    def codes() -> torch.Tensor:
        random = [torch.Generator(GPU).manual_seed(0)]
        *_, last = sample(model, [[1, 2, 3]], [[1]], (6, 6), settings, random, 0, ahead=1)
        return last.codes.cpu()

    expected = codes()
    engine.release(model)
    for block in model.transformer.blocks:
        block.mlp.up_proj.__class__ = Fetched
        block.mlp.up_proj.cpu()
    cuda_graphs._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert torch.equal(codes(), expected)
        codes()
    said = [r.message for r in caplog.records if "not on the GPU" in r.message]
    assert len(said) == 1


def test_an_interrupt_stops_soon():
    """After an exception between two steps nothing is left, and the next picture is right."""
    loaded = load(device=GPU)
    expected = codes_of(loaded, seeds=(1,))
    settings = loaded.config.generation
    steps = loaded.sample([loaded.encode_prompt(PROMPTS[0])], [], settings, [2])
    for step in steps:
        if step.position >= 10:
            steps.close()
            break
    assert torch.equal(codes_of(loaded, seeds=(1,)), expected)
