from collections import Counter

import pytest
import torch

from tokenshuffle_core.training.batches import Batches

SMALL, LARGE = torch.arange(5), torch.arange(100, 123)


@pytest.mark.parametrize("batch", [1, 4, 5, 8, 64])
def test_an_epoch_visits_every_index_once_and_fills_the_last_batch(batch):
    batches = Batches([SMALL, LARGE], batch, seed=0)
    visits = [batches.at(step) for step in range(len(batches))]
    for number, bucket in enumerate((SMALL, LARGE)):
        parts = [indices for which, indices in visits if which == number]
        assert all(len(part) == batch for part in parts)
        assert len(parts) == -(-len(bucket) // batch)
        counts = Counter(torch.cat(parts).tolist())
        assert counts.keys() == set(bucket.tolist())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_repeated_indices_are_visited_as_often():
    batches = Batches([torch.tensor([7, 7, 7, 8])], 2, seed=0)
    visits = torch.cat([batches.at(step)[1] for step in range(len(batches))])
    assert Counter(visits.tolist()) == {7: 3, 8: 1}


def test_order_depends_on_seed_and_epoch_alone():
    first, second = Batches([SMALL, LARGE], 4, 0), Batches([SMALL, LARGE], 4, 0)
    steps = [17, 3, 60, 3]
    assert all(torch.equal(first.at(step)[1], second.at(step)[1]) for step in steps)
    epoch = len(first)
    orders = [
        torch.cat([batches.at(start + i)[1] for i in range(epoch)]).tolist()
        for batches, start in ((first, 0), (first, epoch), (Batches([SMALL, LARGE], 4, 1), 0))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
