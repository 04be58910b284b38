"""Between image tokens and pixels."""

import torch
from comfy_api.latest import io

from . import host
from .types import CATEGORY, VQ, Codes


class TokenShuffleVQDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleVQDecode",
            display_name="Token-Shuffle VQ Decode",
            category=CATEGORY,
            description="Turns image tokens into a picture with the model's image tokenizer.",
            inputs=[
                Codes.Input("codes", tooltip="Image tokens of the sampler or of VQ Encode."),
                VQ.Input("vq", tooltip="The image tokenizer that the tokens belong to."),
                io.Boolean.Input(
                    "tiled",
                    default=False,
                    tooltip="Decode a large picture a strip at a time: the same picture, slower, "
                    "with less memory. Very large ones are decoded so in any case.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
            **host.search_aliases("vae decode", "token shuffle", "tokens to image"),
        )

    @classmethod
    def execute(cls, codes: torch.Tensor, vq: host.Loaded, tiled: bool) -> io.NodeOutput:
        pictures, rows, columns = codes.shape
        stride = vq.pipeline.config.image_tokenizer.stride
        pipeline = vq.with_vq(pictures, rows * columns * stride**2, tiled)
        return io.NodeOutput(pipeline.decode(codes, tiled, vq.vq.load_device))


class TokenShuffleVQEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleVQEncode",
            display_name="Token-Shuffle VQ Encode",
            category=CATEGORY,
            description=(
                "Turns a picture into image tokens. Decode them again to see what the image "
                "tokenizer keeps of it."
            ),
            inputs=[
                io.Image.Input(
                    "image", tooltip="Both sides must be multiples of the tokenizer's stride."
                ),
                VQ.Input("vq", tooltip="The image tokenizer."),
            ],
            outputs=[Codes.Output(display_name="codes", tooltip="Image tokens of the picture.")],
            **host.search_aliases("vae encode", "token shuffle", "image to tokens"),
        )

    @classmethod
    def execute(cls, image: torch.Tensor, vq: host.Loaded) -> io.NodeOutput:
        pictures, height, width, _ = image.shape
        pipeline = vq.with_vq(pictures, height * width)
        return io.NodeOutput(pipeline.encode(image, vq.vq.load_device))
