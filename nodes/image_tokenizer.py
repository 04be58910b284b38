"""Between image codes and pixels."""

import torch
from comfy_api.latest import io

from . import host
from .latents import codes_of, latent_of
from .types import CATEGORY, VQ, Codes


class TokenShuffleVQDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleVQDecode",
            display_name="Token-Shuffle VQ Decode",
            category=CATEGORY,
            description="Turns image codes into a picture with the model's image tokenizer.",
            inputs=[
                Codes.Input("codes", tooltip="From the sampler or from VQ Encode."),
                VQ.Input("vq", tooltip="The image tokenizer that the codes belong to."),
                io.Boolean.Input(
                    "tiled",
                    display_name="save memory",
                    default=False,
                    tooltip="Save memory by decoding in strips: slower, the same picture. Very "
                    "large pictures are always decoded in strips.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
            **host.search_aliases(
                "image tokenizer, image tokenizer decoder, vqgan, vq vae, vae decode, "
                "tokens to image, image tokens to image, codes to image",
                "图像分词器, 解码, VQ解码",
                "画像トークナイザー, デコード",
            ),
        )

    @classmethod
    def execute(cls, codes: dict, vq: host.Loaded, tiled: bool) -> io.NodeOutput:
        host.check_ours(vq)
        return io.NodeOutput(vq.decode_codes(codes_of(codes, vq.codebook), tiled))


class TokenShuffleVQEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleVQEncode",
            display_name="Token-Shuffle VQ Encode",
            category=CATEGORY,
            description=(
                "Turns a picture into image codes. Decode them again to see how much detail the "
                "image tokenizer keeps."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="Cropped in the middle where a side is not a multiple of the image "
                    "tokenizer's stride.",
                ),
                VQ.Input("vq", tooltip="The image tokenizer to encode with."),
            ],
            outputs=[Codes.Output(display_name="codes", tooltip="The picture's codes.")],
            **host.search_aliases(
                "image tokenizer encoder, vqgan encoder, vae encode, image to tokens",
                "图像编码, VQ编码",
                "エンコード",
            ),
        )

    @classmethod
    def execute(cls, image: torch.Tensor, vq: host.Loaded) -> io.NodeOutput:
        host.check_ours(vq)
        return io.NodeOutput(latent_of(vq.encode_image(image), vq.codebook))
