"""LoRA files from training."""

from comfy_api.latest import io

from ..tokenshuffle_core.adapt.lora import MAX_STRENGTH
from . import host
from .types import CATEGORY, Model


class TokenShuffleLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleLoraLoader",
            display_name="Load LoRA (Token-Shuffle)",
            category=CATEGORY,
            description="Applies a LoRA to the model it was trained on. Several can be chained.",
            inputs=[
                Model.Input("model", tooltip="The model that the LoRA was trained on."),
                io.Combo.Input(
                    "lora", options=host.loras(), tooltip="A .safetensors file from models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model. 0 leaves it unchanged; "
                    "negative values reverse the change.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with the LoRA.")],
            **host.search_aliases(
                "lora, load lora, fine-tune",
                "微调, 加载LoRA",
                "LoRA読み込み, ファインチューン",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **inputs) -> str:
        return host.version(host.lora_path(lora))

    @classmethod
    def execute(cls, model: host.Loaded, lora: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(host.with_lora(model, lora, strength))
