"""Training of the image tokenizer on random crops of the pictures.

It is convolutional, so crops teach it what whole pictures would at a fraction of the cost; the
last part of the training sees whole pictures, because GroupNorm and attention do notice the size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import checkpoint
from ..config import ImageTokenizerConfig
from ..image_tokenizer import ImageTokenizer
from .emoji import read_manifest
from .loop import LoopConfig, batch_indices, fit, generator
from .pictures import BACKGROUNDS, WHITE, composite, load_rgba, sheet_of

CPU = torch.device("cpu")
WHOLE_SHARE = 0.15  # the share of the steps, at the end, that sees whole pictures
UNQUANTISED = 200  # first steps of a plain autoencoder: its latents are where the codebook starts
REVIVE_EVERY = 100  # steps between two looks for codes that nothing uses
VALIDATION_PICTURES = 64


class TokenizerTask:
    """L1 + L2 + edge (finite difference) reconstruction losses, and the codebook's."""

    def __init__(self, directory: Path, config: LoopConfig, crop: int, device: torch.device):
        records = read_manifest(directory)
        held_out = [r for r in records if r["split"] == "held-out"][:VALIDATION_PICTURES]
        self.train = load_rgba(directory, [r for r in records if r["split"] == "train"])
        validation = load_rgba(directory, held_out)
        white = torch.tensor([WHITE]).expand(len(validation), 3)
        self.validation = composite(validation, white).to(device)
        self.palette = torch.tensor(list(BACKGROUNDS.values()))
        self.config = config
        self.crop = crop
        self.device = device
        self.unquantised = min(UNQUANTISED, config.steps // 10)
        self.used = None

    def batch(self, step: int) -> Tensor:
        """(batch, 3, crop, crop) in 0..1; near the end fewer but whole pictures."""
        size = self.train.shape[-1]
        whole = step >= self.config.steps * (1 - WHOLE_SHARE)
        crop = size if whole else min(self.crop, size)
        # The same number of pixels in every step keeps memory and step time even.
        count = max(1, self.config.batch * min(self.crop, size) ** 2 // crop**2)
        index = batch_indices(len(self.train), self.config.batch, step, self.config.seed)[:count]
        random = generator(self.config.seed + 1, step)
        # Half on white, as most pictures are asked for; the rest on any colour of the palette.
        colour = torch.randint(-len(self.palette), len(self.palette), (count,), generator=random)
        top, left = torch.randint(0, size - crop + 1, (2, count), generator=random).tolist()
        crops = [
            self.train[i, :, t : t + crop, le : le + crop]
            for i, t, le in zip(index.tolist(), top, left, strict=True)
        ]
        return composite(torch.stack(crops), self.palette[colour.clamp(min=0)]).to(self.device)

    def loss(self, module: ImageTokenizer, step: int):
        images = self.batch(step)
        latent = module.latent(images)
        quantized = module.quantizer(latent)
        continuous = step < self.unquantised
        vectors = F.normalize(latent, dim=1) if continuous else quantized.vectors
        reconstruction = module.pixels(vectors)
        self._revive(module, latent.detach(), quantized.codes, step)
        l1 = F.l1_loss(reconstruction, images)
        l2 = F.mse_loss(reconstruction, images)
        edges = sum(
            F.l1_loss(reconstruction.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2)
        )
        loss = l1 + 4 * l2 + edges + (0 if continuous else quantized.loss)
        psnr = -10 * l2.detach().log10()
        return loss, {"psnr": psnr, "codebook_loss": quantized.loss.detach()}

    def _revive(self, module: ImageTokenizer, latent: Tensor, codes: Tensor, step: int) -> None:
        """Give codes that nothing chose for REVIVE_EVERY steps the place of a random latent."""
        size = module.config.codebook_size
        if step % REVIVE_EVERY == 0:
            self.used = torch.zeros(size, dtype=torch.bool, device=self.device)
        if self.used is None:  # resumed between two looks
            return
        if step >= self.unquantised:
            self.used[codes.flatten()] = True
        if (step + 1) % REVIVE_EVERY == 0 and step < self.config.steps // 2:
            dead = (~self.used).nonzero().flatten()
            vectors = F.normalize(latent.movedim(1, -1).flatten(0, 2), dim=-1)
            pick = torch.randint(
                0, len(vectors), (len(dead),), generator=generator(self.config.seed + 2, step)
            )
            with torch.no_grad():
                module.quantizer.codebook.weight[dead] = vectors[pick]

    def validate(self, module: ImageTokenizer) -> dict[str, float]:
        codes = torch.cat([module.encode(part) for part in self.validation.split(16)])
        images = torch.cat([module.decode(part) for part in codes.split(16)])
        error = (images - self.validation).square().mean((1, 2, 3))
        return {
            "validation_psnr": (-10 * error.log10()).mean().item(),
            "codes_used": float(codes.unique().numel()),
        }

    def sheet(self, module: ImageTokenizer) -> Image.Image:
        images = self.validation[:24]
        decoded = module.decode(module.encode(images))
        return sheet_of(torch.stack([images, decoded], 1).flatten(0, 1), columns=12)

    def save(self, module: ImageTokenizer, path: Path) -> None:
        checkpoint.save_image_tokenizer(path, module)


def train_tokenizer(
    data: Path,
    directory: Path,
    config: ImageTokenizerConfig,
    loop: LoopConfig,
    *,
    crop: int = 64,
    resume: bool = False,
    device: torch.device = CPU,
) -> Path:
    """Train an image tokenizer on the data set in `data`; returns the path of its weights."""
    torch.manual_seed(loop.seed)
    module = ImageTokenizer(config)
    nn.init.normal_(module.quantizer.codebook.weight)
    module.to(device)
    return fit(module, TokenizerTask(data, loop, crop, device), loop, directory, resume)
