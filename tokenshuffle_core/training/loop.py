"""The training loop of the image tokenizer and the model, in one process or in many.

AdamW, or Muon for hidden matrices, linear warm-up then cosine decay, gradient clipping, an
exponential moving average (EMA) of the weights. The batch of a step, over all processes, depends
only on (seed, step), so a resumed run computes exactly what an uninterrupted one would, on any
number of processes.
"""

import copy
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..files import atomic_path, remove_leftovers
from ..lock import lock
from ..shuffle import FuseBlock
from ..stopping import handled
from ..transformer import Block
from . import state
from .distributed import in_any, mean_of_all, rank, spread, world_size
from .log import LOG, Log, Speed, is_log
from .muon import Muon
from .schedule import Schedule
from .settings import LoopConfig

LOG_EVERY = 50  # steps
FINAL = "final.safetensors"
LATEST = "latest.safetensors"  # until there is a final one
BETAS = 0.9, 0.95


class Task(ABC):
    """What is trained: a loss for each step, validation, and a sheet of pictures to look at."""

    idle_parameters = False  # whether a step may leave some unused: DDP must know

    def __init__(self):
        # Tensors that resuming needs, the same in all processes after each step.
        self.state: dict[str, Tensor] = {}
        # Texts that must be the same when it is resumed, such as a checksum of its data.
        self.about: dict[str, str] = {}
        # The share of the training that is over: the loop sets it before each step.
        self.progress = 0.0

    @abstractmethod
    def loss(
        self, module: nn.Module, step: int, piece: int, pieces: int
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of one of `pieces` equal pieces of the step's batch, [piece::pieces], and
        metrics to log; the mean over all pieces must be the loss of the whole batch.

        So random numbers are drawn for the whole batch and then divided. All pieces of a step use
        the same parameters.
        """

    @abstractmethod
    def validate(self, module: nn.Module) -> dict[str, float]: ...
    @abstractmethod
    def sheet(self, module: nn.Module) -> Image.Image: ...
    @abstractmethod
    def save(self, module: nn.Module, path: Path) -> None: ...

    def compile(self, module: nn.Module, compiled: Callable) -> None:  # noqa: B027
        """Replace, in place, what a step calls besides transformer blocks by compiled(it)."""

    def codes_per_sample(self) -> float:
        """For the log; 0 if samples have no image codes."""
        return 0

    def flops_per_sample(self) -> float:
        """Of the forward and backward pass, for the log; 0 if unknown."""
        return 0


def fit(module: nn.Module, task: Task, config: LoopConfig, directory: Path, resume: bool) -> Path:
    """Train `module` in place and return the path of the final weights, the EMA's.

    Within `distributed.process_group` every process calls it with the same arguments. Writes into
    `directory`: `state/` (all that resuming needs, on any number of processes), `log.csv`,
    TensorBoard events if `tensorboard` is installed, `sheet-STEP.png`, and by `task.save`
    `latest.safetensors` with each state, at the end `final.safetensors` in its place. On Ctrl-C,
    SIGTERM and SIGHUP it finishes the step, saves and raises KeyboardInterrupt. With
    `config.minutes` all of this takes that long.

    Raises FileExistsError where `directory` has a training and `resume` is false, or weights or a
    log that would be replaced; FileNotFoundError where there is nothing to resume, BlockingIOError
    where another process trains there, ValueError for settings that do not fit the processes, the
    device, the module or the saved state, FloatingPointError where the training diverges.
    """
    check_loop(config, next(module.parameters()).device)
    _state_to_resume(directory, resume)
    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory) if rank() == 0 else nullcontext():
        return _fit(module, task, config, directory, _state_to_resume(directory, resume))


def _fit(
    module: nn.Module, task: Task, config: LoopConfig, directory: Path, path: Path | None
) -> Path:
    """As `fit`, from the saved state at `path`, in a folder that no other process writes to."""
    device = next(module.parameters()).device
    schedule = Schedule(config, device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    speed = Speed(task, config.batch, device, dtype)
    skeleton = _without_weights(module)
    loss_of = spread(module, task, config, dtype)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    trained = list(parameters.values())
    optimizers = _optimizers(module, trained, config)
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tensors = {
        "model": {name: parameter.detach() for name, parameter in parameters.items()},
        "ema": ema,
        "optimizer": {
            name: optimizer.state[parameter]
            for name, parameter in parameters.items()
            for optimizer in optimizers
            if parameter in optimizer.state
        },
        "task": task.state,
    }
    if path:
        schedule.resume(*state.restore(path, tensors, config, task.about))
    first = schedule.first
    is_first = rank() == 0
    if is_first:
        _tidy(directory)
    log = Log(directory, first) if is_first else None
    saved = time.monotonic()
    speed.restart(first)
    hidden = None if is_first else True  # None: where standard error is not a terminal
    bar = tqdm(schedule.steps(), initial=first, total=schedule.total, disable=hidden)
    with _Interrupt() as interrupt, log or nullcontext(), bar:
        for step in bar:
            task.progress = schedule.progress(step)
            learning_rate = config.learning_rate_at(step, task.progress)
            module.train()
            module.zero_grad(set_to_none=True)
            values = _backward(loss_of, config, step, device)
            norm = nn.utils.clip_grad_norm_(trained, config.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), trained, 1 - config.ema_at(step))
            done = step + 1
            last, early = schedule.after(done)
            if done % LOG_EVERY == 0 or last:
                row = mean_of_all(values | {"gradient_norm": _finite(norm, step)})
                row |= {"learning_rate": learning_rate} | speed.measure(done)
                if log:
                    log.write(done, row)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
            if done % config.validate_every == 0 or last or early:
                with (
                    schedule.ending("validation"),
                    averaged(skeleton, module, ema) as weights,
                    torch.inference_mode(),
                    _autocast(config, device),
                ):
                    if log:
                        log.write(done, task.validate(weights))
                        with atomic_path(directory / f"sheet-{done:07}.png") as temporary:
                            task.sheet(weights).save(temporary, "PNG")
                speed.restart(done)
            # Clocks differ between processes, and Ctrl-C may have reached only some of them.
            due = time.monotonic() - saved > 60 * config.save_minutes
            interrupted, due = in_any(interrupt.pressed, due or early)
            if interrupted or due or last:
                _finite(norm, step)
                with schedule.ending("saving"):
                    seconds = max(schedule.seconds(), 60 * config.minutes * last)
                    state.save(directory, done, seconds, tensors, config, task.about)
                    if not last:
                        with averaged(skeleton, module, ema) as weights:
                            if is_first:
                                task.save(weights, directory / LATEST)
                saved = time.monotonic()
                speed.restart(done)
            if interrupted:
                interrupt.stop(done)
    final = directory / FINAL
    with averaged(skeleton, module, ema) as weights:
        if is_first:
            task.save(weights, final)
            (directory / LATEST).unlink(missing_ok=True)
    return final


@contextmanager
def averaged(skeleton: nn.Module, module: nn.Module, ema: dict[str, Tensor]) -> Iterator[nn.Module]:
    """`skeleton` with the weights of `module`, the trained ones replaced by their average. Every
    process calls it, but only process 0 may use what it yields.

    No weight is copied; sharded ones are gathered, and kept only in process 0.
    """
    weights = {}
    for name, tensor in (module.state_dict() | ema).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            weights[name] = whole
    if rank() == 0:
        skeleton.load_state_dict(weights, assign=True)
    yield skeleton
    skeleton.to("meta")


def check_loop(config: LoopConfig, device: torch.device) -> None:
    """Raises ValueError for settings that do not fit the processes or the device."""
    pieces = world_size() * config.accumulation
    if config.batch % pieces:
        raise ValueError(
            f"batch {config.batch} must be a multiple of {pieces} (accumulation "
            f"{config.accumulation}, processes {world_size()}): choose another batch"
        )
    if config.precision == "bf16" and not _is_native_bf16(device):
        raise ValueError(
            f"this {device.type} does not support bf16 natively: choose precision fp32"
        )


def _is_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _state_to_resume(directory: Path, resume: bool) -> Path | None:
    path = state.latest(directory)
    if path and not resume:
        raise FileExistsError(
            f"{directory} already has a training: add --resume to continue it, or choose "
            "another folder"
        )
    if resume and not path:
        raise FileNotFoundError(f"{directory} has no saved state, so there is nothing to resume")
    weights = [directory / name for name in (FINAL, LATEST) if (directory / name).exists()]
    log = directory / LOG
    if not path and (weights or not is_log(log)):
        raise FileExistsError(
            f"{[*weights, log][0]} would be replaced, and there is no saved state of its training "
            "to continue from: choose another folder, or move it away"
        )
    return path


def _tidy(directory: Path) -> None:
    """Remove what killed processes left half written."""
    remove_leftovers(directory / name for name in (FINAL, LATEST, LOG))
    for sheet in directory.glob(".sheet-*.png.*.part"):
        sheet.unlink()
    shutil.rmtree(directory / "state" / ".unfinished", ignore_errors=True)


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode whose parameters are on the meta device."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    return copy.deepcopy(module, memo).eval()


def generator(seed: int, index: int) -> torch.Generator:
    """An independent generator for item `index` of the run seeded `seed`."""
    return torch.Generator().manual_seed(seed_of(seed, index))


def seed_of(seed: int, index: int) -> int:
    """A seed for item `index` of the run seeded `seed`."""
    return (seed * 1_000_003 + index * 7919 + 12345) % 2**63


def _optimizers(
    module: nn.Module, trained: list[nn.Parameter], config: LoopConfig
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if it is chosen, with a complete state from the start, so that it can be
    saved and restored. Raises ValueError where there is nothing for Muon."""
    hidden = set()
    if config.optimizer == "muon":
        blocks = [part for part in module.modules() if isinstance(part, Block | FuseBlock)]
        hidden = {p for block in blocks for p in block.parameters() if p.ndim == 2}
        hidden &= set(trained)
        if not hidden:
            raise ValueError(
                "muon is for matrices of transformer and fuse blocks, and none are trained here: "
                "choose optimizer adamw"
            )
    others = [p for p in trained if p not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=BETAS,
        fused=True,
    )
    for parameter in others:
        adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if not hidden:
        return [adamw]
    matrices = [p for p in trained if p in hidden]  # in an order that does not change
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    return [adamw, Muon(matrices, config.weight_decay, momentum=BETAS[1], dtype=dtype)]


def _backward(
    loss_of: nn.Module, config: LoopConfig, step: int, device: torch.device
) -> dict[str, float | Tensor]:
    """Accumulate the gradient of this process's pieces; returns their mean loss and metrics."""
    sums = {}
    for turn in range(config.accumulation):
        # A task that uses the global generator gets the same numbers in any process.
        torch.manual_seed(seed_of(config.seed, step))
        more = turn + 1 < config.accumulation
        # DDP accumulates locally and sends once; FSDP has no room for unsharded gradients.
        local = more and isinstance(loss_of, DistributedDataParallel)
        with loss_of.no_sync() if local else nullcontext():
            with _autocast(config, device):
                piece = turn * world_size() + rank()
                loss, metrics = loss_of(step, piece, world_size() * config.accumulation)
            (loss / config.accumulation).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0) + value / config.accumulation
    return sums


def _autocast(config: LoopConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _finite(norm: Tensor, step: int) -> float:
    """The gradient's norm. Raises FloatingPointError if it, and so every weight, is not finite.

    Not called in every step, because it waits for the device.
    """
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient is no longer finite at step {step}: lower the learning rate, and "
            "continue with --resume, or train a recipe again in a new folder"
        )
    return norm.item()


class _Interrupt:
    """Lets the current step finish after Ctrl-C, SIGTERM or SIGHUP, so that no half of it is saved.

    A second Ctrl-C raises KeyboardInterrupt at once; under torchrun, which passes on to its
    processes what the terminal or a scheduler has already sent to them, it does not.
    """

    def __enter__(self) -> "_Interrupt":
        self.number = 0
        self.handlers = ExitStack()
        self.handlers.enter_context(handled(self._press))
        return self

    @property
    def pressed(self) -> bool:
        return self.number > 0

    def _press(self, number: int, _) -> None:
        alone = not torch.distributed.is_torchelastic_launched()
        if self.pressed and number == signal.SIGINT and alone:
            raise KeyboardInterrupt(number)
        if not self.pressed and rank() == 0:
            again = "; Ctrl-C again stops without saving" if alone else ""
            _say(f"stopping after this step{again}")
        self.number = self.number or number

    def stop(self, done: int) -> None:
        """Raises KeyboardInterrupt, in a process that got no signal as well."""
        if rank() == 0:
            _say(f"saved after {done} steps")
        raise KeyboardInterrupt(self.number or signal.SIGINT)

    def __exit__(self, *_) -> None:
        self.handlers.close()


def _say(text: str) -> None:
    with suppress(OSError, RuntimeError):  # a terminal that is closed, or in the middle of a line
        print(text, file=sys.stderr)
