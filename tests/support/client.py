"""The client of the API, which is a script and no part of a package."""

import importlib.util
from pathlib import Path
from types import ModuleType

CLIENT = Path(__file__).resolve().parents[2] / "api" / "client.py"


def load_client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
