"""The graphs themselves need a GPU; what they repeat does not."""

import pytest
import torch

from tests.test_model import CONFIG, model_of
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine import StaticCache
from tokenshuffle_core.sampler import decode, pad_left

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [[[1, 5, 6], [1, 5, 6]], [[1, 5, 6, 7], [1, 2]]])
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_static_cache_computes_what_the_growing_one_does(prompts, chunk):
    model = model_of(2)
    text, padding = pad_left(prompts, 0, "cpu")
    growing, expected = model.prefill(text, padding, 10)
    other, states = model.prefill(text, padding, 10)
    other.keys[:, :, :, other.length :] = 7  # what is behind the end must not count
    other.values[:, :, :, other.length :] = 7
    static = StaticCache(other)
    for step in range(10):
        codes = torch.randint(0, CONFIG.codebook_size, (1, 2, 2))
        length = text.shape[1] + step
        static.reach = min((length // chunk + 1) * chunk, other.keys.shape[3])
        for _ in range(2):  # a graph is warmed up before it counts
            states = model.step(static, codes)
        static.position += 1
        expected = model.step(growing, codes)
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


@cuda
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("head", [0, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_no_picture(cfg, head, temperature):
    model = model_of(2, window_head=head).cuda()
    settings = GenerationConfig(cfg=cfg, temperature=temperature)

    def run(graphs: bool) -> torch.Tensor:
        random = [torch.Generator("cuda").manual_seed(i) for i in range(2)]
        prompts = [[1, 5, 6], [1, 5, 6, 7]], [[1], [1, 2]]
        *_, last = decode(model, *prompts, (30, 30), settings, random, 0, graphs=graphs)
        return last.codes.cpu()

    assert torch.equal(run(True), run(False))
