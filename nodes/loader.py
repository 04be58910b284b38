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
            display_name="Load Token-Shuffle Model",
            category=CATEGORY,
            description=(
                "Loads a Token-Shuffle checkpoint: the model that writes image tokens, and the "
                "image tokenizer (VQ) that turns them into pixels. Published models of LlamaGen "
                "and Janus are read as they came."
            ),
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoints(),
                    tooltip="From models/tokenshuffle: a .safetensors file, a .pt file of LlamaGen "
                    "with vq_ds16_c2i.pt beside it, or a folder of Janus. Or the bundled model.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[AS_STORED, *WEIGHT_KINDS],
                    default=AS_STORED,
                    optional=True,
                    tooltip="8-bit weights take half the memory of 16-bit ones and change pictures "
                    "a little: int8 is for the CPU, fp8 for recent GPUs.",
                ),
            ],
            outputs=[
                Model.Output(display_name="model", tooltip="For the prompts and the sampler."),
                VQ.Output(display_name="vq", tooltip="The image tokenizer, for decode and encode."),
            ],
            **host.search_aliases("token shuffle", "autoregressive", "load checkpoint"),
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weights: str = AS_STORED) -> float:
        # A checkpoint that training has written anew is loaded anew.
        return host.written(host.checkpoint_path(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str, weights: str = AS_STORED) -> io.NodeOutput:
        loaded = host.load_checkpoint(checkpoint, None if weights == AS_STORED else weights)
        return io.NodeOutput(loaded, loaded)
