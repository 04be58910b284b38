"""Loading checkpoints."""

from comfy_api.latest import io

from ..tokenshuffle_core.config import WEIGHT_KINDS
from . import host
from .types import CATEGORY, VQ, Model

AS_STORED = "as stored"


class TokenShuffleLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleLoader",
            # The search finds "token shuffle" first where it is written so.
            display_name="Load Token Shuffle Model",
            category=CATEGORY,
            description=(
                "Loads a Token-Shuffle checkpoint: the model, which generates image codes, and the "
                "image tokenizer (VQ), which turns them into pixels. LlamaGen, Janus, SimpleAR, "
                "Wallaroo and Emu3.5 load as published."
            ),
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoints(),
                    tooltip="The bundled model, or from models/tokenshuffle a .safetensors file, a "
                    "LlamaGen .pt file with its vq_ds16_c2i.pt beside it, or a folder of Janus, "
                    "SimpleAR, Wallaroo or Emu3.5.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[AS_STORED, *WEIGHT_KINDS],
                    default=AS_STORED,
                    optional=True,
                    tooltip="int8 and fp8 take half the memory of 16-bit weights and change the "
                    "pictures slightly; int8 is for CPUs, fp8 for recent GPUs. int4 takes a "
                    "quarter and changes them more.",
                ),
            ],
            outputs=[
                Model.Output(display_name="model", tooltip="For prompts and samplers."),
                VQ.Output(
                    display_name="vq", tooltip="The image tokenizer, for VQ Decode and Encode."
                ),
            ],
            **host.search_aliases(
                "token shuffle, load token, load model, load checkpoint, janus pro, llamagen, "
                "simplear, emu3.5, wallaroo, "
                "emoji, text to image autoregressive, text to image, txt2img, t2i, "
                "image generation, next token prediction, llama image",
                "文生图, 自回归, 自回归文生图, 图像生成, 加载模型, 模型加载器",
                "テキストから画像, 画像生成, 自己回帰, モデル読み込み",
            ),
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        """For a missing model, in the place of ComfyUI's list of all that are there."""
        try:
            return checkpoint is None or bool(host.checkpoint_path(checkpoint))
        except FileNotFoundError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weights: str = AS_STORED) -> str:
        # A checkpoint that training has overwritten is loaded again.
        return host.version(host.checkpoint_path(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str, weights: str = AS_STORED) -> io.NodeOutput:
        loaded = host.load_checkpoint(checkpoint, None if weights == AS_STORED else weights)
        return io.NodeOutput(loaded, loaded)
