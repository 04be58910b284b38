"""What the scripts in this folder share: times, memory and tables."""

import json
import multiprocessing
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from tokenshuffle_core.files import atomic_path, write_text


def seconds_of(function: Callable[[], object], device: str | torch.device) -> float:
    """The duration of one call, including the work that it leaves to a GPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many other programs run meanwhile, each of which keeps a core busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def in_a_process(function: Callable, *arguments):
    """What the function returns in a new process, so that its memory is separate."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mib(device: str) -> float:
    """The most memory that this process has used so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def forget_peak() -> None:
    """From now on, `peak_mib` of a CPU is that of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_anonymous() -> int:
    """The most bytes that this process has used since `forget_peak`, without pages of files."""
    status = Path("/proc/self/status").read_text()
    peak, files = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmHWM", "RssFile"))
    return 1024 * (peak - files)


def machine(device: str) -> dict:
    """The hardware and software that the results of a run depend on."""
    cuda = device.startswith("cuda")
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "cuda": cuda,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@contextmanager
def svg_plot(path: Path, size: tuple[float, float]) -> Iterator:
    """The axes of a plot with a legend, which is saved with the same bytes for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def write_rows(
    header: str, line: Callable[[dict], str], rows: Iterable[dict], path: Path | None, **more
) -> None:
    """Print each row as soon as it is measured, as a line of a Markdown table. Then write all rows
    as JSON, with `more`."""
    print(header)
    written = []
    for row in rows:
        written.append(row)
        print(line(row), flush=True)
    if path:
        write_json(path, more | {"rows": written})


def columns(device: str, rows: dict[str, str]) -> str:
    """A Markdown table of names and values."""
    head = f"| {device} | |\n| --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
