"""Reconstruction: how much of a picture the image tokenizer preserves, and how much of its codebook
it uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.buckets import Size
from ..data.sources import Item
from ..pipeline import Pipeline
from .intervals import Estimate, mean
from .items import load

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Images (N, C, H, W) in 0..1, twice -> PSNR (N,) in dB; infinite for equal images."""
    return -10 * (images - references).square().mean((1, 2, 3)).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Images (N, C, H, W) in 0..1, twice -> structural similarity (N,).

    Wang et al. (IEEE Trans. Image Process. 13, 2004): Gaussian window of 11 x 11 pixels with
    sigma 1.5, K1 0.01, K2 0.03, only where it lies inside the picture; the mean over channels.
    Raises ValueError for a picture smaller than the window.
    """
    if min(images.shape[-2:]) < WINDOW:
        height, width = images.shape[-2:]
        raise ValueError(f"SSIM needs pictures of at least 11x11 pixels, not {width}x{height}")
    axis = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.softmax(-axis.square() / (2 * SIGMA**2), dim=0)
    window = line.outer(line)[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window).unflatten(0, x.shape[:2])[:, :, 0]

    x, y = images.double().cpu(), references.double().cpu()
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    similarity /= (mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2)
    return similarity.mean((1, 2, 3)).float()


def reconstruction(
    pipeline: Pipeline, items: list[Item], size: Size, batch: int = 16
) -> dict[str, Estimate]:
    """PSNR in dB and SSIM over pictures of `size` (width, height), and the share of the codebook
    that they use."""
    values: dict[str, list[float]] = {"PSNR (dB)": [], "SSIM": []}
    used = torch.zeros(pipeline.config.image_tokenizer.codebook_size, dtype=torch.bool)
    for start in range(0, len(items), batch):
        images = load(items[start : start + batch], size)
        codes = pipeline.encode(images.movedim(1, -1))
        decoded = pipeline.decode(codes).movedim(-1, 1)
        values["PSNR (dB)"] += psnr(decoded, images).tolist()
        values["SSIM"] += ssim(decoded, images).tolist()
        used[codes.unique()] = True
    share = Estimate(used.float().mean().item(), math.nan, math.nan, len(used))
    return {name: mean(of) for name, of in values.items()} | {"codebook used": share}
