"""docs/growing.md from its first command to its last, on a small model and real pictures."""

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from weakref import WeakKeyDictionary, finalize

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.support.processes import log_of
from tests.support.public_models import write_simplear
from tests.test_readme import ROOT, blocks, commands
from tokenshuffle_core.adapt.lora import add_lora
from tokenshuffle_core.checkpoints import read, skeleton
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.config import GenerationConfig, ModelConfig
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.training.captions import Captions
from tokenshuffle_core.training.distributed import spread
from tokenshuffle_core.training.model import ModelTask, frozen_names, training_flops
from tokenshuffle_core.training.stages import read_stages

RECIPE = ROOT / "recipes" / "grow-simplear.toml"
FASTER = {
    "4_000": "12",
    "10_000": "12",
    "20_000": "12",
    "batch = 16": "batch = 4",
    "accumulation = 16": "accumulation = 2",
    "lora = 32": "lora = 4",
    "2e-4": "1e-2",
    "5e-5": "2e-3",
    'precision = "bf16"': "warmup = 1\nvalidate_every = 6",
}
LONG = "an apple, " + "very " * 600 + "red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a reader has before the first command; `grown` once all were run."""
    folder = tmp_path_factory.mktemp("growing")
    write_simplear(folder / "SimpleAR-0.5B-RL", max_position_embeddings=2048)
    pictures = folder / "PICTURES"
    pictures.mkdir()
    drawings = sorted((ROOT / "docs").glob("*.png"))[:4]
    for number, drawing in enumerate(drawings):
        with Image.open(drawing) as picture:
            picture.convert("RGB").resize((64, 64)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"an apple, number {number}" if number else LONG)
    (folder / "recipes").mkdir()
    (folder / "recipes" / RECIPE.name).write_text(faster(RECIPE.read_text()))
    return folder


def faster(recipe: str) -> str:
    for true, small in FASTER.items():
        assert true in recipe
        recipe = recipe.replace(true, small)
    return recipe


def run(words: list[str]) -> None:
    small = [word.replace("1024x1024", "64x64") for word in words]
    if small[0] == "generate":
        small += ["--width", "64", "--height", "64", "--any-size"]
    assert main(small) == 0, words


@torch.inference_mode()
def drawn(pipeline: Pipeline, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely codes of a picture, and all logits of them."""
    settings = GenerationConfig(64, 64, cfg=3.0, temperature=0, window=window, any_size=True)
    *_, last = pipeline.stream("a red apple", settings=settings)
    ids = pipeline.text_tokenizer.frame(pipeline.encode_prompt("a red apple"), 4, 4)
    text, padding = torch.tensor([ids]), torch.tensor([0])
    return last.codes, pipeline.model(text, padding, last.codes, window).codes


def test_every_command_in_turn(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    done = []
    for words in commands("docs/growing.md"):
        run(words)
        done.append(words[0])
        if words[0] == "train":  # the first picture's caption is long
            assert "tokens, the model reads 508: the ends of such" in capsys.readouterr().err
    assert done == [
        "convert", "data", "train", "generate", "convert", "merge", "grow", "generate"
    ]  # fmt: skip
    losses = [
        [value for _, name, value in log_of(f"grown/{stage}") if name == "trained_loss"]
        for stage in ("layers", "lora", "whole")
    ]
    assert all(before > after for before, after in pairwise(chain(*losses)))
    before, grown = (load(f"{name}.safetensors") for name in ("simplear", "grown/layers/final"))
    kept, learned = before.model.state_dict(), grown.model.state_dict()
    for name, weight in kept.items():
        assert torch.equal(learned[name], weight), name  # frozen
    assert grown.config.model.windows == (2,)
    assert grown.config.prompt == before.config.prompt
    assert {name.split(".")[0] for name in learned.keys() - kept.keys()} == {"shuffle", "unshuffle"}
    whole, half = Path("grown/whole/final.safetensors"), Path("simplear-2x2.safetensors")
    # Only the image tokenizer, a larger part of a small model, stays in float32.
    images = sum(p.nbytes for p in before.image_tokenizer.state_dict().values())
    assert half.stat().st_size - images < 0.55 * (whole.stat().st_size - images)
    assert Path("apple.png").is_file()
    for name, how in (
        ("simplear-2x2", "grown to window 2, trained on 4 pictures, merged with a LoRA, trained"),
        ("simplear-2x2-lora", "grown to window 2, trained on 4 pictures, merged with a LoRA"),
        ("both", "grown to windows 2, 1"),
    ):
        card = read(f"{name}.safetensors").card
        assert card["modelspec.license"] == before.card["modelspec.license"]
        assert card["modelspec.title"] == f"Made from {before.card['modelspec.title']}"
        assert f"SimpleAR-0.5B-RL by Junke Wang et al.: {how}" in card["modelspec.description"]


def test_window_1_draws_what_it_drew(folder, monkeypatch):
    """After growing, and after the first stage as the page changes it."""
    monkeypatch.chdir(folder)
    convert, data, *_ = commands("docs/growing.md")
    for words, made in ((convert, "simplear.safetensors"), (data, "codes-1024")):
        if not Path(made).exists():  # where this test runs alone
            run(words)
    expected = drawn(load("simplear.safetensors"), 1)
    (stage,) = blocks("docs/growing.md", "toml")
    shared, _, *others = RECIPE.read_text().split("[[stage]]\n")
    whole = "[[stage]]\n".join([shared + stage, *others])
    recipe = Path("elastic.toml")
    recipe.write_text("[[stage]]\n".join(faster(whole).split("[[stage]]\n")[:2]))
    assert main(["grow", "simplear.safetensors", "--windows", "2,1", "-o", "2.safetensors"]) == 0
    assert main(["train", "stages", str(recipe), "-o", "elastic"]) == 0
    for path in ("2.safetensors", "elastic/layers/final.safetensors"):
        grown = load(path)
        assert grown.config.model.windows == (2, 1)
        for found, value in zip(drawn(grown, 1), expected, strict=True):
            assert torch.equal(found, value), path
    losses = [value for _, name, value in log_of("elastic/layers") if name.endswith("window_2")]
    assert losses[-1] < losses[0]


def test_captions_are_framed_as_in_simplears_training(folder):
    """preprocess_t2i of its repository: whole texts, a tenth of them without a caption."""
    tokenizer = read(folder / "SimpleAR-0.5B-RL").text_tokenizer
    names = tokenizer.tokenizer
    start, end = (names.token_to_id(token) for token in ("<|t2i|>", "<|soi|>"))
    captions = Captions([["a red apple"]], tokenizer, 508)
    text, padding = captions.rows(np.array([0, -1]), (2, 2))
    rows = [row[first:].tolist() for row, first in zip(text, padding.tolist(), strict=True)]
    phrase = names.encode("A highly realistic image of a red apple", add_special_tokens=False)
    assert rows == [[start, *phrase.ids, end], [start, end]]


SMALL = ModelConfig(
    text_vocabulary=151_672, codebook_size=64_000, windows=(2, 1), dim=896, layers=24, heads=14,
    kv_heads=2, hidden=4864, qkv_bias=True, context=32_768, max_prompt=508,
)  # fmt: skip
SHAPES = [(1, SMALL), (2, replace(SMALL, dim=1536, layers=28, heads=12, hidden=8960))]


def said(column: int) -> list[float]:
    """The numbers of a column of the page's table."""
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "growing.md").read_text(), re.MULTILINE)
    return [float(re.sub("[^0-9.]", "", row.split(" | ")[column])) for row in rows[2:]]


@pytest.mark.parametrize(("column", "shape"), SHAPES)
def test_what_is_counted(column, shape):
    model = skeleton(shape)
    parts = dict(model.named_parameters())
    new = sum(p.numel() for name, p in parts.items() if name.startswith(("shuffle", "unshuffle")))
    every = sum(p.numel() for p in parts.values())
    flops = [training_flops(model, 4096, window) / 1e12 for window in (1, 2)]
    lora = sum(p.numel() for p in add_lora(model, 32).parameters() if p.requires_grad)
    weights = [every / 1e6, new / 1e6, lora / 1e6]
    memory = [4 * every + 16 * new, 4 * every + 20 * lora, 20 * every]
    found = [*weights, *flops, *(n / 1e9 for n in memory)]
    assert said(column)[: len(found)] == pytest.approx(found, rel=0.02)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, those in `known` included."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakKeyDictionary()
        self.add(*known)

    def add(self, *tensors) -> None:
        for storage in (x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)):
            if storage not in self.seen:
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self.drop, storage.nbytes())

    def drop(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.add(*tree_iter(made))
        return made


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize(("column", "shape"), SHAPES)
def test_what_a_step_takes(column, shape, stage):
    """Of one picture, as in the recipe, with tensors that have no numbers."""
    stage, row = read_stages(RECIPE).stages[stage], stage - 3
    with FakeTensorMode():
        model = TokenShuffleModel(replace(shape, windows=(2,)))
        for name in frozen_names(model, stage.freeze):
            model.get_parameter(name).requires_grad_(False)
        if stage.lora:
            add_lora(model, stage.lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = [torch.empty_like(p) for p in trained for _ in range(3)]  # AdamW and the average
        codes, text = torch.zeros(1, 64, 64, dtype=int), torch.zeros(1, 100, dtype=int)

        class OfOnePicture:
            recipe = stage.recipe

            def loss(self, model, *_):
                logits = model(text, text[:, 0], codes, targets=codes).codes
                return ModelTask.code_loss(self, logits, model.targets(codes))

        loss_of = spread(model, OfOnePicture(), stage.loop, torch.bfloat16)
        with Live([*model.parameters(), *kept]) as live:
            for _ in range(2):  # the second adds to gradients
                with torch.autocast("cpu", torch.bfloat16):
                    loss, _ = loss_of(0, 0, 1)
                loss.backward()
                del loss
    assert said(column)[row] == pytest.approx(live.most / 1e9, rel=0.02)
