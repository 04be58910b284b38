"""The training loop that the image tokenizer and the model share.

AdamW, linear warm-up then cosine decay, gradient clipping, an exponential moving average (EMA)
of the weights. A batch is a function of (seed, step) alone, so a resumed run continues exactly
where the unbroken run would be.
"""

import csv
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..files import atomic_path


@dataclass(frozen=True)
class LoopConfig:
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    final_learning_rate: float = 0.02  # as a share of the peak
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    validate_every: int = 500
    save_minutes: float = 5.0

    def __post_init__(self):
        for name in ("steps", "batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (
            self.final_learning_rate + (1 - self.final_learning_rate) * cosine
        )


class Task(Protocol):
    """What is trained: a loss per step, scores now and then, and a sheet to look at."""

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, dict[str, float | Tensor]]: ...
    def validate(self, module: nn.Module) -> dict[str, float]: ...
    def sheet(self, module: nn.Module) -> Image.Image: ...
    def save(self, module: nn.Module, path: Path) -> None: ...


def fit(module: nn.Module, task: Task, config: LoopConfig, directory: Path, resume: bool) -> Path:
    """Train `module` in place and return the path of the final weights, the EMA's.

    Writes into `directory`: `state.pt` (all that resuming needs), `log.csv`, TensorBoard events
    where `tensorboard` is installed, `sheet-STEP.png`, and `final.safetensors` through
    `task.save`. Raises FileExistsError where a training lies there and `resume` is false,
    FileNotFoundError where there is nothing to resume.
    """
    state_path = directory / "state.pt"
    if state_path.exists() and not resume:
        raise FileExistsError(
            f"{directory} already holds a training: add --resume to continue it, or choose "
            "another folder"
        )
    if resume and not state_path.exists():
        raise FileNotFoundError(f"{state_path} does not exist, so there is nothing to resume")
    directory.mkdir(parents=True, exist_ok=True)
    optimizer = _optimizer(module, config)
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    first = 0
    if resume:
        first = _restore(state_path, module, ema, optimizer, config)
    log = _Log(directory, first)
    saved = time.monotonic()
    try:
        bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=None)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            module.train()
            loss, metrics = task.loss(module, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient is not finite at step {step}: lower the learning rate and "
                    "continue with --resume"
                )
            optimizer.step()
            ema.update_parameters(module)
            done = step + 1
            if done % 50 == 0 or done == config.steps:
                row = {"loss": loss.item(), "gradient_norm": norm.item()}
                row |= {name: float(value) for name, value in metrics.items()}
                log.write(done, row | {"learning_rate": config.learning_rate_at(step)})
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if done % config.validate_every == 0 or done == config.steps:
                with averaged(ema) as weights, torch.inference_mode():
                    log.write(done, task.validate(weights))
                    with atomic_path(directory / f"sheet-{done:07}.png") as temporary:
                        task.sheet(weights).save(temporary, "PNG")
            if time.monotonic() - saved > 60 * config.save_minutes or done == config.steps:
                _save(state_path, module, ema, optimizer, config, done)
                saved = time.monotonic()
    except KeyboardInterrupt:
        _save(state_path, module, ema, optimizer, config, step)
        raise
    finally:
        log.close()
    with averaged(ema) as weights:
        task.save(weights, directory / "final.safetensors")
    return directory / "final.safetensors"


@contextmanager
def averaged(ema: AveragedModel) -> Iterator[nn.Module]:
    """The averaged module in evaluation mode."""
    ema.module.eval()
    yield ema.module


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Indices (batch,) int64 of step `step`: each epoch visits every item once, shuffled."""
    first = step * batch
    chosen = []
    while len(chosen) < batch:
        epoch, offset = divmod(first + len(chosen), count)
        order = torch.randperm(count, generator=generator(seed, epoch))
        chosen += order[offset : offset + batch - len(chosen)].tolist()
    return torch.tensor(chosen)


def generator(seed: int, index: int) -> torch.Generator:
    """An independent generator for item `index` of the run seeded `seed`."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index * 7919 + 12345) % 2**63)


def _optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def _save(path: Path, module, ema, optimizer, config: LoopConfig, step: int) -> None:
    state = {
        "module": module.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "step": step,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, module, ema, optimizer, config: LoopConfig) -> int:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["config"]["batch"] != config.batch or state["config"]["seed"] != config.seed:
        raise ValueError(
            f"{path} was made with batch {state['config']['batch']} and seed "
            f"{state['config']['seed']}: resume with the same"
        )
    module.load_state_dict(state["module"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class _Log:
    """log.csv with the columns step, name, value; TensorBoard beside it where installed."""

    def __init__(self, directory: Path, first: int):
        path = directory / "log.csv"
        kept = []
        if first and path.exists():
            with open(path, newline="") as file:
                rows = list(csv.reader(file))[1:]
            kept = [row for row in rows if int(row[0]) <= first]
        self.file = open(path, "w", newline="")  # noqa: SIM115
        self.writer = csv.writer(self.file)
        self.writer.writerows([("step", "name", "value"), *kept])
        try:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(directory, purge_step=first + 1)
        except ImportError:
            self.board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.writerow((step, name, f"{value:.6g}"))
            if self.board:
                self.board.add_scalar(name, value, step)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
