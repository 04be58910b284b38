"""Image codes as one of ComfyUI's latents, which its own nodes can save, batch, cut and mask.

    {"samples": float32 (B, dim, h, w), "codes": int64 (B, h, w), "codebook": Codebook}

`samples` are the codebook's vectors of the codes. ComfyUI's nodes change them and know nothing of
the other two, so they count, and `codes` only as long as they agree. Codes from a file come without
a codebook: their `samples` (B, 1, h, w) are the numbers themselves.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codebook:
    """That of an image tokenizer: `vectors` float32 (codes, dim), on the CPU, the
    name of the `model` that it came with, and how many pixels a code stands for on each side, its
    `stride`. Two are the same where their vectors are."""

    model: str
    vectors: Tensor
    stride: int

    def check(self, reader: "Codebook") -> None:
        """Raises ValueError if the codes of this one mean something else to `reader`."""
        if self is not reader and not torch.equal(self.vectors, reader.vectors):
            raise ValueError(
                f"these codes are from {self.model}, and {reader.model} has another image "
                "tokenizer: use the vq of the model that they are from, or decode and encode them"
            )

    def nearest(self, samples: Tensor) -> Tensor:
        """samples (B, dim, h, w) -> the codes of the nearest vectors, int64 (B, h, w); row by row,
        since the products with the codebook are large."""
        half_squares = self.vectors.square().sum(1) / 2
        rows = samples.float().cpu().movedim(1, -1).split(1, 1)
        return torch.cat([(row @ self.vectors.T - half_squares).argmax(-1) for row in rows], 1)


def latent_of(codes: Tensor, codebook: Codebook | None) -> dict:
    """Codes int64 (B, h, w) as a latent."""
    if codebook is None:
        return {"samples": codes[:, None].float(), "codes": codes}
    samples = codebook.vectors[codes].movedim(-1, 1).contiguous()
    return {"samples": samples, "codes": codes, "codebook": codebook}


def codes_of(latent: dict, reader: Codebook | None) -> Tensor:
    """The codes of a latent, int64 (B, h, w), for the image tokenizer whose codebook is `reader`,
    or as numbers alone. Raises ValueError for what are no codes, or another's."""
    samples, own = latent["samples"], latent.get("codebook")
    if own and reader:
        own.check(reader)
    book = reader or own
    if samples.ndim == 4 and samples.shape[1] == 1:
        codes = samples[:, 0].round().long()
        if not torch.equal(codes.to(samples), samples[:, 0]):
            raise ValueError(
                "these codes were loaded as numbers, and a node has mixed them: decode and encode "
                "them first"
            )
        if book and codes.numel() and not 0 <= codes.min() <= codes.max() < len(book.vectors):
            raise ValueError(
                f"codes must be from 0 to {len(book.vectors) - 1}, the codebook of {book.model}; "
                "these are from another model or are not codes"
            )
        return codes.cpu()
    if book is None:
        raise ValueError(
            "this latent does not say what image tokenizer it is from, as those of ComfyUI's VAE "
            "Encode and Load Latent do not: connect the vq of the model that it is from"
        )
    dim = book.vectors.shape[1]
    if samples.ndim != 4 or samples.shape[1] != dim:
        raise ValueError(
            f"this latent of shape {tuple(samples.shape)} has no image codes: those of "
            f"{book.model} have the shape (pictures, {dim}, rows, columns)"
        )
    codes = latent.get("codes")
    if codes is None or codes.shape != samples[:, 0].shape:
        return book.nearest(samples)
    same = torch.equal(book.vectors[codes], samples.float().cpu().movedim(1, -1))
    return codes if same else book.nearest(samples)


def kept_by(mask: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """How many whole rows at the top and columns on the left a noise mask (n, 1, H, W) keeps, of
    a grid of `rows` x `columns` windows. A window is drawn where any of it is masked. Raises
    ValueError for a mask that keeps anything else."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    kept = F.adaptive_max_pool2d(mask, (rows, columns))[:, 0] <= 0.5
    top = int(kept[0].all(1).long().cumprod(0).sum())
    left = int(kept[0].all(0).long().cumprod(0).sum())
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    expected[:top] = expected[:, :left] = True
    if not (kept == expected).all():
        raise ValueError(
            "this noise mask keeps more than whole rows at the top and whole columns on the left, "
            "which is all that a model which draws row by row can complete: mask all the rest"
        )
    return top, left
