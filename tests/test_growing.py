"""docs/growing.md from its first command to its last, on a small model and real pictures."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.processes import log_of
from tests.support.public_models import write_simplear
from tests.test_readme import ROOT, commands
from tokenshuffle_core.checkpoints import skeleton
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.config import ModelConfig
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training.model import training_flops

SMALL = {"1024x1024": "64x64", "10000": "6", "32": "2"}


def test_every_command_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_simplear(Path("SimpleAR-0.5B-RL"), max_position_embeddings=2048)
    pictures = Path("PICTURES")
    pictures.mkdir()
    drawings = sorted((ROOT / "docs").glob("*.png"))[:4]
    for number, drawing in enumerate(drawings):
        with Image.open(drawing) as picture:
            picture.convert("RGB").resize((64, 64)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"an apple, number {number}")
    recipe = (ROOT / "recipes" / "grow-simplear.toml").read_text()
    for true, small in {
        "4_000": "12",
        "20_000": "12",
        "batch = 16": "batch = 4",
        "accumulation = 16": "accumulation = 2",
        "5e-5": "2e-3",
        'precision = "bf16"': "warmup = 1\nvalidate_every = 6",
    }.items():
        assert true in recipe
        recipe = recipe.replace(true, small)
    Path("recipes").mkdir()
    Path("recipes/grow-simplear.toml").write_text(recipe)
    done = []
    for words in commands("docs/growing.md"):
        small = [SMALL.get(word, word) for word in words]
        if small[0] == "generate":
            small += ["--width", "64", "--height", "64", "--any-size"]
        assert main(small) == 0, words
        done.append(small[0])
    assert done == ["convert", "data", "train", "generate", "train", "merge"]
    for folder in ("grown/layers", "grown/whole"):
        losses = [value for _, name, value in log_of(folder) if name == "trained_loss"]
        assert losses[-1] < losses[0]
    before, grown = (load(f"{name}.safetensors") for name in ("simplear", "grown/layers/final"))
    kept, learned = before.model.state_dict(), grown.model.state_dict()
    for name, weight in kept.items():
        assert torch.equal(learned[name], weight), name  # frozen
    assert grown.config.model.windows == (2,)
    assert grown.config.prompt == before.config.prompt
    assert {name.split(".")[0] for name in learned.keys() - kept.keys()} == {"shuffle", "unshuffle"}
    assert Path("apple.png").is_file()


@pytest.mark.parametrize(
    ("column", "shape"),
    [
        (1, {"dim": 896, "layers": 24, "heads": 14, "hidden": 4864}),
        (2, {"dim": 1536, "layers": 28, "heads": 12, "hidden": 8960}),
    ],
)
def test_what_is_counted(column, shape):
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "growing.md").read_text(), re.MULTILINE)
    said = [float(re.sub("[^0-9.]", "", row.split(" | ")[column])) for row in rows[2:]]
    model = skeleton(
        ModelConfig(
            text_vocabulary=151_672, codebook_size=64_000, windows=(2, 1), kv_heads=2,
            qkv_bias=True, context=32_768, max_prompt=508, **shape,
        )
    )  # fmt: skip
    parts = dict(model.named_parameters())
    new = sum(p.numel() for name, p in parts.items() if name.startswith(("shuffle", "unshuffle")))
    every = sum(p.numel() for p in parts.values())
    flops = [training_flops(model, 4096, window) / 1e12 for window in (1, 2)]
    found = [every / 1e6, new / 1e6, *flops, (4 * every + 16 * new) / 1e9, 20 * every / 1e9]
    assert said == pytest.approx(found, rel=0.02)
