"""LoRA files that training has made."""

from comfy_api.latest import io

from . import host
from .types import CATEGORY, Model


class TokenShuffleLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleLoraLoader",
            display_name="Load Token-Shuffle LoRA",
            category=CATEGORY,
            description="Changes a model by a LoRA that was trained on it. Several can be chained.",
            inputs=[
                Model.Input("model", tooltip="The model that the LoRA was trained on."),
                io.Combo.Input(
                    "lora", options=host.loras(), tooltip="A .safetensors file from models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much of the change. 0 leaves the model as it is, negative values "
                    "turn it round.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The changed model.")],
            **host.search_aliases("token shuffle", "lora", "fine-tune"),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **inputs) -> float:
        return host.modified(host.LORAS, lora)

    @classmethod
    def execute(cls, model: host.Loaded, lora: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(host.with_lora(model, lora, strength))
