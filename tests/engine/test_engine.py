"""The graphs themselves need a GPU; what they repeat does not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.models import CONFIG, model_of
from tokenshuffle_core import pipeline
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine import cpu_linear as linear
from tokenshuffle_core.engine import windows_ahead
from tokenshuffle_core.engine.cpu_linear import Linear
from tokenshuffle_core.engine.cpu_transformer import FewRows
from tokenshuffle_core.engine.cuda_graphs import StaticCache
from tokenshuffle_core.sampler import decode, pad_left

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.mark.parametrize("float16", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pictures_are_those_of_the_plain_loop(temperature, float16, monkeypatch):
    """That is with torch's own layers, and a window a step."""
    float16 = float16 and linear._multiplies_float16()
    monkeypatch.setattr(linear, "_multiplies_float16", lambda: float16)
    loaded = pipeline.load()
    settings = replace(loaded.config.generation, temperature=temperature)
    assert windows_ahead(loaded.model, torch.device("cpu"), 1) > 1

    def pictures() -> list[torch.Tensor]:
        """Two with several windows a step, then two with a few rows."""
        ids = loaded.encode_prompt("a red apple, 3d style"), []
        found = [list(loaded.sample(*ids, settings, seed=seed))[-1].codes for seed in range(2)]
        return [*found, list(loaded.sample(*ids, settings, seed=7, count=2))[-1].codes]

    made = []
    of = FewRows.of
    monkeypatch.setattr(FewRows, "of", lambda *args: made.append(of(*args)) or made[-1])
    fast = pictures()
    most = linear.MANY_IN_FLOAT16 if float16 else linear.MANY
    assert [few_rows.rows for few_rows in made] == [most] * 3
    monkeypatch.setattr(Linear, "forward", nn.Linear.forward)
    monkeypatch.setattr(FewRows, "of", lambda *_: None)
    monkeypatch.setattr(pipeline, "windows_ahead", lambda *_: 1)
    assert all(map(torch.equal, fast, pictures()))


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [[[1, 5, 6], [1, 5, 6]], [[1, 5, 6, 7], [1, 2]]])
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_static_cache_computes_what_the_growing_one_does(prompts, chunk):
    model = model_of(2)
    text, padding = pad_left(prompts, 0, "cpu")
    growing, _ = model.prefill(text, padding, 12)
    other, _ = model.prefill(text, padding, 12)
    for held in (*other.keys, *other.values):
        held[:, :, other.length :] = torch.nan  # what is behind the end must not count
    static = StaticCache(other)
    for count, wrong in [(1, 0), (3, 0), (3, 2), (2, 1), (4, 4), (1, 0), (2, 0)]:
        codes = torch.randint(0, CONFIG.codebook_size, (1, count, 2, 2))
        static.reach = min(-(-(static.length + count) // chunk) * chunk, other.capacity)
        for _ in range(2):  # a graph is warmed up before it counts
            states = model.step(static, codes)
        static.move(count)
        torch.testing.assert_close(states, model.step(growing, codes), rtol=1e-4, atol=1e-5)
        static.drop(wrong)
        growing.drop(wrong)
        assert static.length == growing.length == int(static.position)


@cuda
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("head", [0, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ahead", [1, 4])
def test_graphs_change_no_picture(cfg, head, temperature, ahead):
    model = model_of(2, window_head=head).cuda()
    settings = GenerationConfig(cfg=cfg, temperature=temperature)

    def run(engine: bool) -> torch.Tensor:
        random = [torch.Generator("cuda").manual_seed(i) for i in range(2)]
        prompts = [[1, 5, 6], [1, 5, 6, 7]], [[1], [1, 2]]
        *_, last = decode(model, *prompts, (30, 30), settings, random, 0, None, ahead, engine)
        return last.codes.cpu()

    assert torch.equal(run(True), run(False))
