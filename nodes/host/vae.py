"""An image tokenizer as a VAE of ComfyUI's: what its nodes call of `comfy.sd.VAE`."""

import torch

from ..latents import Codebook, codes_of, latent_of


class VAE:
    """`decode_codes`, `encode_image` and `stride` in terms of latents and under ComfyUI's names.
    The image tokenizer has strips of its own, so that its tiles need no sizes."""

    codebook: Codebook
    stride: int

    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        return self.decode_codes(codes_of({"samples": samples}, self.codebook))

    def decode_tiled(self, samples: torch.Tensor, **tiles) -> torch.Tensor:
        return self.decode_codes(codes_of({"samples": samples}, self.codebook), save_memory=True)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return latent_of(self.encode_image(pixels[..., :3]), self.codebook)["samples"]

    def encode_tiled(self, pixels: torch.Tensor, **tiles) -> torch.Tensor:
        return self.encode(pixels)

    @property
    def downscale_ratio(self) -> int:
        return self.stride

    @property
    def latent_channels(self) -> int:
        return self.codebook.vectors.shape[1]

    def spacial_compression_decode(self) -> int:
        return self.stride

    def spacial_compression_encode(self) -> int:
        return self.stride

    def temporal_compression_decode(self) -> None:
        return None
