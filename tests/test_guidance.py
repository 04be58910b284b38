import pytest
import torch

from tokenshuffle_core.config import SCHEDULES
from tokenshuffle_core.guidance import guide, scale_at


def test_guide_is_the_formula():
    conditional, unconditional = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = -2 * unconditional + 3 * conditional
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), expected)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


def test_schedules_follow_their_formulas():
    n, cfg = 64, 5.0
    for t in range(n):
        assert scale_at("constant", cfg, t, n) == cfg
        assert scale_at("linear", cfg, t, n) == pytest.approx(1 + 4 * t / (n - 1))
        half = 1 + 4 * t / (n / 2) if t < n / 2 else cfg
        assert scale_at("half-linear", cfg, t, n) == pytest.approx(half)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("positions", [2, 3, 64])
def test_every_schedule_ends_at_the_target(schedule, positions):
    assert scale_at(schedule, 7.5, positions - 1, positions) == pytest.approx(7.5)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule must be one of constant, linear, half-linear"):
        scale_at("cosine", 2.0, 0, 4)
