"""Sets up and starts ComfyUI hosts for development and tests. Needs git and the standard library.

    python scripts/comfyui.py setup SOURCE     SOURCE: a git URL, clone, bare mirror or plain folder
    python scripts/comfyui.py list
    python scripts/comfyui.py start --version 0.33.0 --port 8188

Each host lies in its own folder outside this repository, `$TOKENSHUFFLE_HOSTS/<name>/`
(by default `~/.cache/tokenshuffle/hosts/<name>/`):

    ComfyUI/    the host's source, unmodified
    venv/       its virtual environment, about 6 GB
    base/       models, input, output and custom_nodes of `start`; this pack is linked there
    ready       the host's version, written last: without it `setup` resumes
"""

import argparse
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-TokenShuffle"
# One matching set: torchvision and torchaudio fail to import beside any other torch.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# ComfyUI 0.3.64 imports it but does not require it: transformers used to install it.
UNDECLARED = ("requests",)
START = 180  # seconds that a host may take to start
HOW_TO_GET_ONE = "python scripts/comfyui.py setup SOURCE (a git URL or a folder of ComfyUI)"


@dataclass(frozen=True)
class Host:
    name: str
    version: str
    root: Path

    @property
    def clone(self) -> Path:
        return self.root / "ComfyUI"

    @property
    def python(self) -> Path:
        return self.root / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def hosts_folder() -> Path:
    default = Path.home() / ".cache" / "tokenshuffle" / "hosts"
    return Path(os.environ.get("TOKENSHUFFLE_HOSTS") or default)


def hosts() -> list[Host]:
    """Every host whose setup finished, oldest version first."""
    ready = [
        Host(marker.parent.name, marker.read_text().strip(), marker.parent)
        for marker in hosts_folder().glob("*/ready")
    ]
    return sorted(ready, key=lambda host: [int(n) for n in re.findall(r"\d+", host.version)])


def find_host(version: str | None) -> Host:
    """The host with that version or name; the newest for None. Raises ValueError."""
    ready = hosts()
    if not ready:
        raise ValueError(f"there is no ComfyUI host in {hosts_folder()}: {HOW_TO_GET_ONE}")
    fitting = [host for host in ready if version in (None, host.version, host.name)]
    if not fitting:
        names = ", ".join(host.name for host in ready)
        raise ValueError(f"there is no ComfyUI host {version} in {hosts_folder()}, only {names}")
    return fitting[-1]


def setup(source: str, name: str | None = None) -> Host:
    """Sets up the host, or what is missing of it. `name` defaults to its version."""
    folder = hosts_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if name is None or not (folder / name / "ComfyUI").exists():
        # The version, and so the folder's name, is in the source.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            copy_source(source, Path(new) / "ComfyUI")
            name = name or source_version(Path(new) / "ComfyUI")
            if not (folder / name / "ComfyUI").exists():
                (folder / name).mkdir(exist_ok=True)
                (Path(new) / "ComfyUI").rename(folder / name / "ComfyUI")
    root = folder / name
    host = Host(name, source_version(root / "ComfyUI"), root)
    if not (root / "ready").exists():
        install(host)
        (root / "ready").write_text(host.version + "\n")
    return host


def copy_source(source: str, target: Path) -> None:
    """Clones a git repository, or copies a plain folder such as an unpacked archive."""
    path = Path(source).expanduser()
    if (path / "main.py").exists() and not (path / ".git").exists():
        shutil.copytree(path, target)
        return
    depth = [] if path.exists() else ["--depth", "1"]
    subprocess.run(["git", "clone", "--no-checkout", *depth, source, target], check=True)
    # A mirror may lack its largest files. Git then checks out all others and complains, which
    # `git clone` would treat as a failure; the host starts without its tokenizers' tables.
    subprocess.run(["git", "-C", target, "checkout", "--quiet"], check=False)
    status = ["git", "-C", target, "ls-files", "--deleted"]
    missing = subprocess.run(status, capture_output=True, text=True, check=True).stdout.split()
    if missing:
        print(f"missing in {source}: {', '.join(missing)}", file=sys.stderr)


def source_version(clone: Path) -> str:
    file = clone / "comfyui_version.py"
    if not (clone / "main.py").exists() or not file.exists():
        raise ValueError(f"{clone} is not ComfyUI: it has no main.py or no comfyui_version.py")
    return re.search(r'__version__ = "([^"]+)"', file.read_text())[1]


def install(host: Host) -> None:
    lines = (host.clone / "requirements.txt").read_text().splitlines()
    names = [requirement.split("==")[0] for requirement in TORCH]
    others = [line for line in lines if re.split(r"[\s=<>~!;]", line)[0] not in names]
    requirements = host.root / "requirements.txt"
    requirements.write_text("\n".join([*TORCH, *UNDECLARED, *others]) + "\n")
    if not host.python.exists():
        venv.create(host.root / "venv", with_pip=True)
    subprocess.run([host.python, "-m", "pip", "install", "-r", requirements], check=True)


def prepare_base(base: Path) -> None:
    """Makes a base directory with this repository, and no other clone of it, in its custom_nodes.
    Raises ValueError where something other than a link has its name."""
    for folder in ("custom_nodes", "input", "output", "models", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_NAME
    if link.resolve() == PACK:
        return
    if link.is_symlink():
        print(f"{link} was a link to {link.resolve()}", file=sys.stderr)
        link.unlink()
    elif link.exists():
        raise ValueError(f"{link} is not a link to {PACK}: move it away")
    link.symlink_to(PACK, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    host: Host, base: Path, port: int, extra: Sequence[str] = (), log: int | IO | None = None
) -> Iterator[subprocess.Popen]:
    """The host on the CPU with this pack, from its first answer to the end of the block; both its
    streams go to the file `log`. Raises RuntimeError if it ends or stays silent."""
    prepare_base(base)
    command = [host.python, "-s", host.clone / "main.py", "--cpu", "--port", str(port)]
    command += ["--disable-api-nodes", "--disable-auto-launch", "--base-directory", base]
    # The database alone does not follow the base directory.
    command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", *extra]
    process = subprocess.Popen(command, cwd=host.clone, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5).close()
                break
            except (http.client.HTTPException, OSError):  # a URLError is an OSError
                status, failure = process.poll(), f"did not answer within {START} s"
                if status is not None:
                    failure = f"ended with exit status {status}"
                if status is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ComfyUI {failure}") from None
                time.sleep(0.3)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start(version: str | None, port: int, extra: list[str]) -> int:
    """Runs a host in the foreground until it ends or Ctrl-C. Returns its exit status."""
    host = find_host(version)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ValueError(f"port {port} is in use: choose another with --port")
    # `kill` ends the server as Ctrl-C does; by default it would end only this script.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(host, host.root / "base", port, extra) as process:
            print(f"ComfyUI {host.version}: http://127.0.0.1:{port}", flush=True)
            return process.wait()
    except KeyboardInterrupt:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("setup", help="clone a ComfyUI and install what it requires")
    command.add_argument(
        "source",
        nargs="?",
        default=os.environ.get("COMFYUI_PATH"),
        help="git URL, clone, bare mirror or plain folder (default: $COMFYUI_PATH)",
    )
    command.add_argument("--name", help="name of the host (default: its version)")
    commands.add_parser("list", help="print the hosts that are ready: version and folder")
    command = commands.add_parser("start", help="start a host on the CPU with this pack")
    command.add_argument("--version", help="version or name (default: the newest)")
    command.add_argument("--port", type=int, default=8188)
    arguments, extra = parser.parse_known_args()
    if extra and arguments.command != "start":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    try:
        if arguments.command == "setup":
            if not arguments.source:
                parser.error("setup needs a SOURCE, or COMFYUI_PATH in the environment")
            host = setup(arguments.source, arguments.name)
            print(f"ComfyUI {host.version} is ready in {host.root}")
        elif arguments.command == "list":
            for host in hosts():
                print(f"{host.version}\t{host.root}")
        else:
            return start(arguments.version, arguments.port, extra)
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
