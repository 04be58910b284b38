"""What a training step computes."""

from ..model import TokenShuffleModel


def training_flops(model: TokenShuffleModel, codes: int, window: int) -> float:
    """FLOPs of forward and backward for a picture of `codes` codes: 6 N T + 12 L d T^2 for T
    transformer positions (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights of the matrices that one position passes, s * s times those that each of
    the window's codes passes. Text, a few dozen positions, is left out.
    """
    weights = 0
    for name, parameter in model.named_parameters():
        part, at, *_ = name.split(".")
        if part in ("shuffle", "unshuffle", "window_head") and at != str(window):
            continue
        if parameter.ndim == 2 and "embedding" not in name:
            by_code = "head" in part or name.endswith(("compress.weight", "expand.weight"))
            weights += parameter.numel() * (window**2 if by_code else 1)
    positions = codes / window**2
    config = model.config
    return 6 * weights * positions + 12 * config.layers * config.width * positions**2
