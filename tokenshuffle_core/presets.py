"""Shapes of models that are trained from nothing, and of known image tokenizers."""

from .config import Config, GenerationConfig, ImageTokenizerConfig, ModelConfig

LLAMAGEN_VQ16 = ImageTokenizerConfig()
LLAMAGEN_VQ8 = ImageTokenizerConfig(channel_multipliers=(1, 2, 2, 4))
EMOJI_VQ8 = ImageTokenizerConfig(
    channels=16, channel_multipliers=(1, 2, 4, 8), res_blocks=1, norm_groups=8,
    latent_channels=64, codebook_size=1024,
)  # fmt: skip

PRESETS = {
    "tiny": Config(
        ImageTokenizerConfig(
            channels=8, channel_multipliers=(1, 1, 2), res_blocks=1, norm_groups=4,
            latent_channels=16, codebook_size=64,
        ),
        ModelConfig(
            text_vocabulary=512, codebook_size=64, dim=32, layers=2, heads=4, kv_heads=2,
            hidden=64, context=1200, max_prompt=64, max_grid=64,
        ),
        GenerationConfig(width=32, height=32, cfg=2.0),
    ),
    "small": Config(
        EMOJI_VQ8,
        ModelConfig(
            text_vocabulary=4096, codebook_size=1024, dim=256, layers=6, heads=4, kv_heads=4,
            hidden=704, context=16_640, max_prompt=252, max_grid=128,
        ),
        GenerationConfig(width=128, height=128, cfg=2.0, temperature=0.7),
    ),
    "emoji-256": Config(
        EMOJI_VQ8,
        ModelConfig(
            text_vocabulary=8192, codebook_size=1024, dim=448, layers=8, heads=7, kv_heads=7,
            hidden=1216, windows=(4,), window_head=256, context=16_640, max_prompt=252,
            max_grid=128,
        ),
        GenerationConfig(width=256, height=256, cfg=2.0, temperature=0.7),
    ),
    "emoji-2048": Config(
        ImageTokenizerConfig(
            channels=32, channel_multipliers=(1, 2, 4, 8, 8), res_blocks=1, norm_groups=16,
            latent_channels=128, codebook_size=4096,
        ),
        ModelConfig(
            text_vocabulary=8192, codebook_size=4096, dim=512, layers=12, heads=8, kv_heads=8,
            hidden=1408, context=4352, max_prompt=252, max_grid=128,
        ),
        GenerationConfig(width=2048, height=2048, cfg=4.0, temperature=0.5),
    ),
    "paper-2.7b": Config(
        LLAMAGEN_VQ16,
        ModelConfig(
            text_vocabulary=32_000, codebook_size=16_384, dim=3072, layers=20, heads=24,
            kv_heads=24, hidden=8192, context=8192, max_prompt=512, max_grid=256,
        ),
        GenerationConfig(width=2048, height=2048, cfg=7.5),
    ),
}  # fmt: skip
