"""Adds windows to a trained model, staying as close to the original as the layers allow.

The new TokenShuffle projects each code's embedding onto the d / s^2 directions with the most energy
(leading right singular vectors of all embeddings), and TokenUnshuffle expands with the transpose,
so together they lose only the remaining directions. Fuse blocks start as the identity. The
transformer, the embeddings and the head stay the same.
"""

from dataclasses import replace

import torch
from torch import nn

from ..engine.quantize import check_whole
from ..model import TokenShuffleModel
from ..pipeline import Pipeline
from .card import changed_card


@torch.no_grad()
def grow(parent: Pipeline, windows: tuple[int, ...], window_head: int = 0) -> Pipeline:
    """A pipeline made from `parent` that supports `windows`, the first of them by default.

    Windows of the parent keep their layers. `window_head` is the hidden size of new window heads,
    which start without effect. Raises ValueError if the model's shape does not allow the windows,
    and for quantised weights.
    """
    check_whole(parent.model)
    old = parent.config.model
    shape = replace(old, windows=windows, window_head=window_head or old.window_head)
    config = replace(parent.config, model=shape)
    model = TokenShuffleModel(shape)
    model.initialise()
    kept = {
        name: weight
        for name, weight in parent.model.state_dict().items()
        if name in model.state_dict() and not name.startswith("window_embedding")
    }
    model.load_state_dict(kept, strict=False)
    if model.window_embedding is not None:
        nn.init.zeros_(model.window_embedding.weight)
        for i, window in enumerate(windows):
            if parent.model.window_embedding is not None and window in old.windows:
                row = parent.model.window_embedding.weight[old.windows.index(window)]
                model.window_embedding.weight[i] = row
    directions = torch.linalg.svd(model.code_embedding.weight.float(), full_matrices=False).Vh
    for window in windows:
        if window > 1 and window not in old.windows:
            basis = directions[: shape.dim // window**2]
            model.shuffle[str(window)].compress.weight.copy_(basis)
            model.unshuffle[str(window)].expand.weight.copy_(basis.T)
            for side in (model.shuffle, model.unshuffle):
                for block in side[str(window)].fuse:
                    nn.init.zeros_(block.down.weight)
        head = model.window_head_of(window)
        if head is not None and not (old.window_head and window in old.windows):
            nn.init.zeros_(head.output.weight)
    how = f"grown to window{'s' * (len(windows) > 1)} {', '.join(map(str, windows))}"
    return replace(parent, config=config, model=model.eval(), card=changed_card(parent.card, how))


def kept_share(parent: Pipeline, window: int) -> float:
    """The fraction of the code embeddings' energy (sum of squares) that a new window keeps."""
    values = torch.linalg.svdvals(parent.model.code_embedding.weight.float()).square()
    return (values[: parent.config.model.dim // window**2].sum() / values.sum()).item()
