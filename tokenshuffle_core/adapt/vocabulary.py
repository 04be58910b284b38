"""Another text tokenizer for a trained model, for instance to teach it more languages."""

from dataclasses import replace

import torch
from torch import Tensor

from ..model import TokenShuffleModel
from ..pipeline import Pipeline
from ..text_tokenizer import TextTokenizer


@torch.no_grad()
def change_text_tokenizer(parent: Pipeline, tokenizer: TextTokenizer) -> Pipeline:
    """A pipeline with the weights of `parent` that encodes prompts with `tokenizer`.

    Fast vocabulary transfer (arXiv 2402.09977): a token that exists in both keeps its embedding; a
    new one starts at the mean of the old tokens that its text splits into. Raises ValueError for a
    class-conditional parent, and for one with row ends.
    """
    if not isinstance(parent.text_tokenizer, TextTokenizer):
        raise ValueError("a class-conditional model does not read text")
    if parent.config.model.row_end is not None:
        raise ValueError("a model that reads the ends of rows as text keeps its text tokenizer")
    shape = replace(parent.config.model, text_vocabulary=len(tokenizer))
    model = TokenShuffleModel(shape)
    weights = parent.model.state_dict()
    table = weights["text_embedding.weight"]
    rows = [_embedding(table, i, parent.text_tokenizer, tokenizer) for i in range(len(tokenizer))]
    model.load_state_dict(weights | {"text_embedding.weight": torch.stack(rows)})
    config = replace(parent.config, model=shape, prompt=tokenizer.prompt)
    return replace(parent, config=config, model=model.eval(), text_tokenizer=tokenizer)


def _embedding(table: Tensor, token: int, old: TextTokenizer, new: TextTokenizer) -> Tensor:
    name = new.tokenizer.id_to_token(token)
    same = old.tokenizer.token_to_id(name)
    if same is not None:
        return table[same]
    text = new.text_of([token])
    pieces = [] if "\ufffd" in text else old.encode(text)
    # Part of a character decodes to no text, and the old tokenizer may drop an article, but the
    # name in a byte-level vocabulary has bytes.
    pieces = pieces or [old.tokenizer.token_to_id(c) for c in name]
    pieces = [piece for piece in pieces if piece is not None]
    return table[pieces].mean(0) if pieces else table.mean(0)
