"""Changes to a trained model: LoRA, other windows, another text tokenizer."""

from .grow import grow
from .lora import add_lora, merge_lora, read_lora, save_lora
from .vocabulary import change_text_tokenizer

__all__ = ["add_lora", "change_text_tokenizer", "grow", "merge_lora", "read_lora", "save_lora"]
