"""Which pictures a step trains on."""

import torch
from torch import Tensor

from .loop import generator


class Batches:
    """Batches of pictures of one size. An epoch visits every index of every bucket once, in an
    order that depends only on (seed, epoch); the last batch of a bucket repeats its first ones.

    `buckets` are int64 indices; an index that occurs n times is visited n times.
    """

    def __init__(self, buckets: list[Tensor], batch: int, seed: int):
        self.buckets = buckets
        self.batch = batch
        self.seed = seed
        self.counts = [-(-len(bucket) // batch) for bucket in buckets]
        self.planned = None, []  # an epoch and its plan

    def __len__(self) -> int:
        """Steps per epoch."""
        return sum(self.counts)

    def at(self, step: int) -> tuple[int, Tensor]:
        """The bucket of step `step`, and the indices (batch,) int64."""
        epoch, i = divmod(step, len(self))
        planned, plan = self.planned
        if epoch != planned:
            plan = self._plan(epoch)
            self.planned = epoch, plan
        return plan[i]

    def _plan(self, epoch: int) -> list[tuple[int, Tensor]]:
        random = generator(self.seed, epoch)
        batches = []
        for number, bucket in enumerate(self.buckets):
            order = bucket[torch.randperm(len(bucket), generator=random)]
            missing = self.counts[number] * self.batch - len(order)
            filled = torch.cat([order, order.repeat(-(-missing // max(1, len(order))))[:missing]])
            batches += [(number, part) for part in filled.split(self.batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
