"""TorchScript archives: what is read of them, and that none of it runs."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.cosmos import Cosmos, Half, write_cosmos
from tests.support.published import randomise
from tokenshuffle_core.checkpoints import torchscript
from tokenshuffle_core.checkpoints.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Odd(nn.Module):
    """Attributes of every kind that TorchScript keeps, and tensors that are not contiguous."""

    numbers: list[int]
    names: dict[str, float]

    def __init__(self):
        super().__init__()
        self.numbers, self.names, self.pair, self.text = [1, 2], {"a": 1.5}, (1, "b"), "c"
        self.inner = nn.ModuleList([nn.Linear(3, 2), nn.BatchNorm1d(2)])
        self.again = self.inner[0]
        self.turned = nn.Parameter(torch.randn(4, 5).T)
        self.register_buffer("part", torch.randn(7, 6)[1:5:2, 2:4])
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(3, dtype=torch.uint8))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x) * self.numbers[0] * self.names["a"]


def read(path: Path) -> dict[str, torch.Tensor]:
    return {name: reader() for name, _, reader in torchscript.tensors(path)}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tensors_bit_for_bit(dtype, tmp_path):
    model = randomise(Cosmos())
    folder = write_cosmos(model, tmp_path, dtype)
    for name in ("encoder", "decoder"):
        same(read(folder / f"{name}.jit"), torch.jit.load(folder / f"{name}.jit").state_dict())
    found = Source(folder)
    for name, x in model.to(dtype).state_dict().items():
        assert torch.equal(found[name], x)


def test_whatever_a_module_holds(tmp_path):
    module = torch.jit.script(Odd())
    module.save(tmp_path / "a.jit")
    same(read(tmp_path / "a.jit"), module.state_dict())


@pytest.fixture
def archive(tmp_path) -> Path:
    torch.jit.script(nn.Linear(2, 3)).save(tmp_path / "a.jit")
    return tmp_path / "a.jit"


def changed(path: Path, name: str, change, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in entries.items():
            ours = each.endswith(name)
            kind = method if ours else zipfile.ZIP_STORED
            archive.writestr(each, change(content) if ours else content, kind)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_its_code_does_not_run(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = read(archive)
    changed(archive, ".py", lambda _: b"no code")
    changed(archive, "constants.pkl", lambda _: pickle.dumps(Evil(), 2))
    same(read(archive), expected)
    for evil in (
        pickle.dumps(Evil(), 2),
        pickle.dumps({"a": Evil()}, 2),
        b"cposix\nsystem\n(X\x09\0\0\0touch rantR.",
        b"c__torch__.os\nsystem\n(X\x09\0\0\0touch rantR.",
        b"\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"(X\x09\0\0\0touch raniposix\nsystem\n.",
        b"\x82\x01.",
    ):
        changed(archive, "data.pkl", lambda _, evil=evil: evil)
        with pytest.raises(ValueError, match=r"asks for|instruction|holds no modules"):
            Source(archive)
    assert not (tmp_path / "ran").exists()


MODULE = b"c__torch__\nA\n)\x81"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x00%b"
    b"X\x03\0\0\0cpuK\x06tQ%btR"
)
LAYER = b"q%b" + MODULE + b"}(X\x01\0\0\0ah%bX\x01\0\0\0bh%bub"


def tensor(key: bytes, numbers: bytes) -> bytes:
    return MODULE + b"}X\x06\0\0\0weight" + TENSOR % (key, numbers + b"\x89}") + b"sb."


def nested(layers: int) -> bytes:
    """Each module holds the one before it twice."""
    numbers = (bytes([i]) for i in range(layers))
    return MODULE + b"".join(LAYER % (i, i, i) for i in numbers) + b"."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(b"0", b"K\0(K\x03K\x03t(K\x03K\x01t"), r"claims more data than it has: \(3, 3\)"),
        (tensor(b"0", b"K\x01(K\x03K\x02t(K\x02K\x01t"), "claims more data"),
        (tensor(b"0", b"K\0(K\x40t(K\0t"), "claims more data"),  # one number, many times
        (tensor(b"0", b"K\0(K\x02t(J\xff\xff\xff\xfft"), "is no tensor"),
        (tensor(b"0", b"K\0(K\x02K\x02t(K\x01t"), "is no tensor"),
        (tensor(b"9", b"K\0(K\x01t(K\x01t"), "the data of weight is missing"),
        (nested(60), "hold each other too often"),
        (MODULE + b"q\0}X\x01\0\0\0ah\0sb.", "too often"),
        (b"}.", "holds no modules"),
        (b")q\0h\0h\0\x86\x85.", "holds no modules"),
        (b"", "pickle"),
        (b"N", "exhausted"),
        (b"h\x05.", "is damaged"),
        (b"].", "holds no modules"),
        (b"}" + b"(" * 10**5 + b".", "holds no modules"),
        (b"}h\0K\1s.", "is damaged"),
        (b"})q\0h\0h\0\x86q\0K\1s.", "neither a name nor a number"),
    ],
)
def test_pickles_of_strangers(pickled, message, archive):
    changed(archive, "data.pkl", lambda _: pickled)
    with pytest.raises(ValueError, match=message):
        Source(archive)


def test_zip_files_of_strangers(archive, tmp_path):
    whole = archive.read_bytes()
    changed(archive, "data/0", lambda _: bytes(10**6), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="claims more data than its"):
        Source(archive)
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        Source(archive)
    archive.write_bytes(whole)
    source = Source(archive)
    changed(archive, "data/0", lambda content: content[:4])  # after its header was read
    with pytest.raises(ValueError, match="claims more data"):
        _ = source["weight"], source["bias"]
    torch.save(Half(Cosmos(), "quant_conv").state_dict(), archive)
    with pytest.raises(ValueError, match="TorchScript"):
        Source(archive)
