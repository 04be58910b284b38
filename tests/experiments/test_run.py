import copy

import torch

from experiments.run import limit_rank
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.presets import PRESETS


def test_a_limited_rank_is_that_of_the_weights_and_stays_in_training():
    torch.manual_seed(0)
    model = TokenShuffleModel(PRESETS["tiny"].model)
    model.initialise()
    scale = model.head.weight.std().item()
    limit_rank(model, 6)
    assert 0.7 * scale < model.head.weight.std().item() < 1.4 * scale
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    text, padding = torch.ones(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    codes = torch.randint(0, 64, (1, 8, 8))
    before = model.head.weight.detach().clone()
    model(text, padding, codes).codes.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(before, model.head.weight)
    for weight in (model.head.weight, model.code_embedding.weight):
        assert torch.linalg.matrix_rank(weight) == 6
    again = copy.deepcopy(model)  # as the training's averaged weights are evaluated
    again.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(again.head.weight, model.head.weight)
