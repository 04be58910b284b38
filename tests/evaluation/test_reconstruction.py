import math

import numpy as np
import pytest
import torch
from PIL import Image

from tokenshuffle_core.evaluation.items import choose, load
from tokenshuffle_core.evaluation.reconstruction import psnr, reconstruction, ssim


def waves() -> tuple[torch.Tensor, torch.Tensor]:
    """Two RGB pictures of 32 x 24 pixels, as (1, 3, H, W)."""
    y, x, c = np.meshgrid(np.arange(24), np.arange(32), np.arange(3), indexing="ij")
    first = 0.5 + 0.4 * np.sin(0.7 * x + 0.3 * y + c)
    second = np.clip(first + 0.15 * np.cos(1.9 * x * y + c), 0, 1)
    return tuple(torch.from_numpy(p).movedim(-1, 0)[None] for p in (first, second))


def test_psnr_and_ssim_are_those_of_scikit_image():
    """scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1, channel_axis=2) and peak_signal_noise_ratio."""
    first, second = waves()
    assert psnr(first, second).item() == pytest.approx(19.70481521986526, abs=1e-9)
    assert ssim(first, second).item() == pytest.approx(0.9167902089248394, abs=1e-6)
    both = ssim(torch.cat([first, second]), torch.cat([first, first]))
    assert both.tolist() == pytest.approx([1, 0.9167902], abs=1e-6)


def test_ssim_of_constant_pictures():
    """Without variance only the luminance term is left: (2 m n + C1) / (m m + n n + C1)."""
    dark, light = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6)
    assert ssim(dark, light).item() == pytest.approx(0.2401 / 0.4001, abs=1e-6)
    with pytest.raises(ValueError, match="at least 11x11 pixels, not 11x10"):
        ssim(dark[:, :, 1:], light[:, :, 1:])


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        noise = Image.effect_noise((40, 32), 30 + 20 * i)
        noise.convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"noise {i}\n")
    return tmp_path


def test_reconstruction_is_that_of_the_pipeline(pipeline, folder):
    items = choose(folder, "train", None, 0)
    found = reconstruction(pipeline, items, (32, 32), batch=2)
    levels, similarities, codes = [], [], []
    for item in items:
        left = item.picture().crop((4, 0, 36, 32))  # the middle of 40 x 32 pixels
        image = torch.from_numpy(np.array(left)).float()[None] / 255
        codes.append(pipeline.encode(image))
        decoded = pipeline.decode(codes[-1])
        levels.append(-10 * math.log10((decoded - image).square().mean().item()))
        similarities.append(ssim(decoded.movedim(-1, 1), image.movedim(-1, 1)).item())
    assert found["PSNR (dB)"].value == pytest.approx(sum(levels) / 5, abs=1e-3)
    assert found["PSNR (dB)"].n == found["SSIM"].n == 5
    assert found["SSIM"].value == pytest.approx(sum(similarities) / 5, abs=1e-4)
    used = set(torch.cat(codes).flatten().tolist())
    assert found["codebook used"].value == pytest.approx(len(used) / 64)


def test_items_are_a_seeded_part_of_a_split(folder):
    keys = [item.key for item in choose(folder, "train", 3, 0)]
    assert len(set(keys)) == 3
    assert keys == [item.key for item in choose(folder, "train", 3, 0)]
    assert keys != [item.key for item in choose(folder, "train", 3, 1)]
    with pytest.raises(ValueError, match="no picture of the split 'held-out', all 5 are"):
        choose(folder, "held-out", 3, 0)
    assert load(choose(folder, "train", 2, 0), (24, 16)).shape == (2, 3, 16, 24)
