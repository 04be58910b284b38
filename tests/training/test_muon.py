"""Muon against torch's own, against the singular value decomposition, and in the loop."""

import pytest
import torch
from torch import nn

from tests.support.models import model_of
from tests.support.processes import log_of, model, train, weights_of
from tokenshuffle_core.shuffle import FuseBlock
from tokenshuffle_core.training.loop import _optimizers
from tokenshuffle_core.training.muon import Muon, orthogonalised
from tokenshuffle_core.training.settings import LoopConfig
from tokenshuffle_core.transformer import Block

SHAPES = [(16, 16), (16, 48), (48, 16), (16, 16), (5, 7)]


def matrices() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def give_gradients(parameters, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_it_does_what_torch_does():
    ours, theirs, before = matrices(), matrices(), matrices()
    mine = Muon(ours, weight_decay=0.1, momentum=0.95)
    mine.param_groups[0]["lr"] = 0.02
    other = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        for parameters, optimizer in ((ours, mine), (theirs, other)):
            give_gradients(parameters, step)
            optimizer.step()
    for found, expected, start in zip(ours, theirs, before, strict=True):
        moved = (expected - start).norm()
        assert (found - expected).norm() < 0.02 * moved  # torch computes in bf16


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalised_keeps_the_singular_vectors(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    changed = u.mT @ orthogonalised(x) @ vt.mT
    values = changed.diagonal(dim1=-2, dim2=-1)
    # Values far below the largest are not yet there after five iterations.
    assert ((values[s > 0.1 * s.amax()] - 0.95).abs() < 0.3).all()
    off = changed - torch.diag_embed(values)
    assert off.abs().max() < 1e-3


def test_parameters_without_a_gradient_stay():
    parameters = matrices()
    optimizer = Muon(parameters, weight_decay=0.1, momentum=0.95)
    optimizer.param_groups[0]["lr"] = 0.1
    before = [parameter.detach().clone() for parameter in parameters]
    give_gradients(parameters[1:], 0)
    optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(parameters, before, strict=True)]
    assert same == [True, False, False, False, False]
    assert not optimizer.state[parameters[0]]["momentum_buffer"].any()


def test_matrices_of_blocks_and_nothing_else():
    module = model_of(4, window_head=8, fuse_blocks=1)
    config = LoopConfig(optimizer="muon")
    adamw, muon = _optimizers(module, list(module.parameters()), config)
    of_muon = {p for group in muon.param_groups for p in group["params"]}
    of_adamw = {p for group in adamw.param_groups for p in group["params"]}
    assert not of_muon & of_adamw
    assert of_muon | of_adamw == set(module.parameters())
    blocks = {
        p for m in module.modules() if isinstance(m, Block | FuseBlock) for p in m.parameters()
    }
    assert of_muon == {p for p in blocks if p.ndim == 2}
    assert len(of_muon) == 7 * module.config.layers + 4
    assert len(_optimizers(module, list(module.parameters()), LoopConfig())) == 1


def test_it_learns_resumes_exactly_and_in_pieces(tmp_path):
    train(tmp_path / "whole", optimizer="muon")
    losses = [value for _, name, value in log_of(tmp_path / "whole") if name == "validation_loss"]
    assert losses[-1] < losses[0]
    train(tmp_path / "broken", optimizer="muon", stop_at=6)
    train(tmp_path / "broken", optimizer="muon", resume=True)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    train(tmp_path / "pieces", optimizer="muon", accumulation=4)
    for name, weight in weights_of(tmp_path / "pieces").items():  # but for rounding
        moved = whole[name] - model().state_dict()[name]
        assert (weight - whole[name]).norm() <= 0.01 * moved.norm(), name
    train(tmp_path / "adamw")
    assert any(
        (weight - whole[name]).abs().max() > 1e-3
        for name, weight in weights_of(tmp_path / "adamw").items()
    )


def test_what_it_is_not_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="muon needs whole matrices, and shard divides them"):
        LoopConfig(optimizer="muon", shard=True)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, not 'sgd'"):
        LoopConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="none are trained here: choose optimizer adamw"):
        _optimizers(
            nn.Linear(2, 2), list(nn.Linear(2, 2).parameters()), LoopConfig(optimizer="muon")
        )
    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match="was saved with optimizer adamw: resume with the same"):
        train(tmp_path, steps=4, optimizer="muon", resume=True)
