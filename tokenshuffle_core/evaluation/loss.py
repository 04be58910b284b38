"""Validation loss: nats per code of pictures given as codes."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipeline import Pipeline
from ..sampler import pad_left
from .intervals import Estimate, mean


def validation_loss(
    pipeline: Pipeline,
    pairs: Sequence[tuple[str, Tensor]],
    batch: int = 16,
    window: int | None = None,
) -> Estimate:
    """Cross-entropy in nats per code over pairs of a prompt and codes (H, W) int64.

    Every code has the same weight, whatever the size of its picture and the batch; the interval is
    over pictures. `window` is one of the model's, by default its first; H and W must be multiples
    of it. A prompt that is too long is cut.
    """
    window = window or pipeline.config.model.window
    by_size: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for prompt, codes in pairs:
        by_size.setdefault(tuple(codes.shape), []).append((prompt, codes))
    nats, counts = [], []
    for group in by_size.values():
        for start in range(0, len(group), batch):
            prompts, codes = zip(*group[start : start + batch], strict=True)
            nats += picture_nats(pipeline, prompts, torch.stack(codes), window).tolist()
            counts += [codes[0].numel()] * len(prompts)
    total = sum(counts)
    value = sum(nats) / max(1, total)
    # A ratio of two sums: its linearised terms have the ratio as their mean, and its variance.
    scale = len(counts) / max(1, total)
    return mean([value + scale * (n - value * c) for n, c in zip(nats, counts, strict=True)])


@torch.inference_mode()
def picture_nats(pipeline: Pipeline, prompts: Sequence[str], codes: Tensor, window: int) -> Tensor:
    """-log p(codes | prompt) of each picture, codes (B, H, W) -> float64 (B,) on the CPU."""
    model, tokenizer = pipeline.model, pipeline.text_tokenizer
    rows, columns = codes.shape[1] // window, codes.shape[2] // window
    pixels = window * pipeline.config.image_tokenizer.stride
    device = model.head.weight.device
    longest = pipeline.config.model.max_prompt  # longer prompts are cut, as in training
    frame = partial(tokenizer.frame, rows=rows, columns=columns, pixels=pixels)
    framed = [frame(tokenizer.cut(tokenizer.encode(prompt), longest)) for prompt in prompts]
    text, padding = pad_left(framed, tokenizer.pad, device)
    codes = codes.to(device)
    logits = model(text, padding, codes, window).codes.float()
    targets = model.targets(codes, window).flatten()
    losses = F.cross_entropy(logits.flatten(0, 2), targets, reduction="none")
    return losses.view(len(codes), -1).double().sum(dim=1).cpu()
