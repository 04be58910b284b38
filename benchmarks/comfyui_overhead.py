"""The time that ComfyUI adds to a picture, with previews off and on, in the same run.

    python -m benchmarks.comfyui_overhead [--version 0.33.0] [--rounds 10] [--size 128] [--busy 1]

Each round makes one picture the way the command line does (in a process of the host's Python that
keeps the model loaded) and one through POST /prompt for each preview setting, with fresh seeds.
Prints medians, and medians of the ratios within a round; with `--busy` beside so many other
programs that each keep one core busy. Needs a host of scripts/comfyui.py that accepts a preview
setting with each prompt.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import comfyui, workflows

from .measure import busy_programs

API = comfyui.PACK / "api" / "text_to_image_api.json"
SETTINGS = ("none", "auto")
BASELINE = """
import sys, time
from dataclasses import replace
from tokenshuffle_core.images import write_png
from tokenshuffle_core.pipeline import load

pipeline = load()
size = {"width": int(sys.argv[1]), "height": int(sys.argv[1]), "any_size": True}
settings = replace(pipeline.config.generation, **size)
for seed in sys.stdin:
    started = time.perf_counter()
    image = pipeline.generate("a red apple", settings=settings, seed=int(seed)).images[0]
    write_png(sys.argv[2], image)
    print(time.perf_counter() - started, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", help="of the host (default: the newest)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--busy", type=int, default=0, help="other programs meanwhile")
    options = parser.parse_args()
    host = comfyui.find_host(options.version)
    url = f"http://127.0.0.1:{(port := comfyui.free_port())}"
    with tempfile.TemporaryDirectory() as base:
        command = [host.python, "-c", BASELINE, str(options.size), f"{base}/baseline.png"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        baseline = subprocess.Popen(command, cwd=comfyui.PACK, **pipes)
        try:
            with comfyui.running(host, Path(base), port, log=subprocess.DEVNULL):
                seeds = range(options.rounds)
                with busy_programs(options.busy):
                    times = [measure(url, baseline, seed, options.size) for seed in seeds]
        finally:
            baseline.kill()
    times = times[1:]  # the first round warms up
    print(f"ComfyUI {host.version}, {options.size} pixels a side, {len(times)} rounds")
    for name in times[0]:
        seconds = statistics.median(row[name] for row in times)
        ratio = statistics.median(row[name] / row["command line"] for row in times)
        print(f"{name}: {seconds:.2f} s, ratio {ratio:.3f}")


def measure(url: str, baseline: subprocess.Popen, seed: int, size: int) -> dict[str, float]:
    """Seconds for one picture with each way of making it."""
    baseline.stdin.write(f"{seed}\n")
    baseline.stdin.flush()
    times = {"command line": float(baseline.stdout.readline())}
    for i, setting in enumerate(SETTINGS):
        prompt = json.loads(API.read_text())
        sampler = prompt["sampler"]["inputs"]
        options = {name: sampler[name] for name in ("schedule", "temperature", "top_k", "top_p")}
        prompt["options"] = {
            "class_type": "TokenShuffleOptions",
            "inputs": options | {"any_size": True},
        }
        sampler |= {"width": size, "height": size, "seed": 2 * seed + i, "options": ["options", 0]}
        entry = workflows.wait(url, workflows.submit(url, prompt, preview_method=setting))
        stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"]}
        seconds = (stamps["execution_success"] - stamps["execution_start"]) / 1000
        times[f"ComfyUI, previews {setting}"] = seconds
    return times


if __name__ == "__main__":
    sys.exit(main())
