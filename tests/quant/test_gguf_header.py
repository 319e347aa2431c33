"""Headers of GGUF files: made by hand, hostile, damaged at random."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_files import config as small_config
from gguf_files import encode, entry, metadata, plain, string, write
from npqwen_quant.gguf import GgufModel
from npqwen_quant.gguf_header import is_gguf, read_architecture, read_header

from npqwen.errors import CheckpointError, NpqwenError

HUGE = 1 << 60
ARCH = entry("general.architecture", "qwen3")


def head(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def tensor(name: str = "x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + data


HOSTILE = {
    "empty": (b"", "is not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "the magic only": (b"GGUF", "ends at byte 4"),
    "version 1": (head(version=1), "GGUF version 1, and npqwen reads 2 and 3"),
    "version 0": (head(version=0), "GGUF version 0"),
    "a version of the future": (head(version=77), "GGUF version 77"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors without end": (head(tensors=HUGE) + bytes(1000), "tensors"),
    "entries without end": (head(entries=HUGE) + bytes(1000), "entries"),
    "too few tensors": (head(tensors=9) + tensor(), "ends at byte"),
    "a string without end": (head(entries=1) + struct.pack("<Q", HUGE) + bytes(1000), "ends at byte"),
    "a value without end": (head(entries=1) + string("k") + struct.pack("<IQ", 8, HUGE), "ends at byte"),
    "an array of strings without end": (head(entries=1) + string("k") + array(8, HUGE, bytes(1000)), "values"),
    "an array of bytes without end": (head(entries=1) + string("k") + array(0, HUGE, bytes(1000)), "values"),
    "a short array": (head(entries=1) + string("k") + array(5, 1000, bytes(8)), "ends at byte"),
    "an array of arrays": (head(entries=1) + string("k") + array(9, 2, bytes(100)), "unknown type 9"),
    "a value of no type": (head(entries=1) + string("k") + struct.pack("<I", 99) + bytes(99), "unknown type 99"),
    "a key twice": (head(entries=2) + ARCH + ARCH, "'general.architecture' appears twice"),
    "a key that is not UTF-8": (head(entries=1) + entry("", 1).replace(string(""), string(b"\xff")), "not UTF-8"),
    "a tensor twice": (head(tensors=2) + tensor() + tensor(), "tensor x appears twice"),
    "no dimensions": (head(tensors=1) + tensor(shape=()) + bytes(99), "0 dimensions"),
    "many dimensions": (head(tensors=1) + tensor(shape=(1,) * 9) + bytes(99), "9 dimensions"),
    "dimensions without end": (head(tensors=1) + string("x") + struct.pack("<I", 1 << 31), "2147483648 dimensions"),
    "a dimension of 0": (head(tensors=1) + tensor(shape=(32, 0)) + bytes(99), "no elements"),
    "a tensor without end": (head(tensors=1) + tensor(shape=(HUGE, HUGE)) + bytes(99), "x ends at"),
    "a tensor out of the file": (head(tensors=1) + tensor(offset=1 << 40) + bytes(999), "x ends at"),
    "an offset that wraps": (head(tensors=1) + tensor(offset=(1 << 64) - 32) + bytes(999), "x ends at"),
    "an odd offset": (head(tensors=1) + tensor(offset=4) + bytes(999), "not aligned to 32"),
    "overlapping tensors": (
        head(tensors=2) + tensor() + tensor("y", (64,), offset=64) + bytes(999),
        "tensor y overlaps",
    ),
    "rows of parts of blocks": (head(tensors=1) + tensor(shape=(33,), kind=2) + bytes(999), "not a multiple of"),
    "alignment 0": (head(entries=1) + entry("general.alignment", 0), "general.alignment is 0"),
    "alignment 48": (head(entries=1) + entry("general.alignment", 48), "general.alignment is 48"),
    "alignment of text": (head(entries=1) + entry("general.alignment", "32"), "general.alignment is '32'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line_and_little_memory(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    if case == "overlapping tensors":
        data = data.replace(struct.pack("<IQ", 0, 64) + bytes(999), struct.pack("<IQ", 0, 96) + bytes(999))
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("kind", "name"), [(16, "IQ2_XXS"), (40, "NVFP4"), (15, "Q8_K"), (28, "F64"), (12345, "type 12345")]
)
def test_other_formats_are_refused_by_name(kind: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head(tensors=1) + tensor("blk.0.attn_q.weight", (256,), kind) + bytes(999))
    with pytest.raises(CheckpointError, match=f"blk.0.attn_q.weight is stored as {name}, which .* it reads F32, F16"):
        read_header(path)


def test_values_of_every_type(tmp_path: Path) -> None:
    values = {
        "u8": (0, "<B", 255),
        "i8": (1, "<b", -1),
        "u16": (2, "<H", 65535),
        "i16": (3, "<h", -2),
        "u32": (4, "<I", 1 << 31),
        "i32": (5, "<i", -3),
        "f32": (6, "<f", 1e-6),
        "bool": (7, "<?", True),
        "u64": (10, "<Q", 1 << 63),
        "i64": (11, "<q", -4),
        "f64": (12, "<d", 0.1),
    }
    entries = {key: struct.pack("<I", kind) + struct.pack(form, value) for key, (kind, form, value) in values.items()}
    path = tmp_path / "x.gguf"
    lists = {"texts": ["", "ä", "b"], "numbers": [1, -2], "text": "a\0b"}
    flags = struct.pack("<IIQ", 9, 7, 3) + b"\0\1\2"
    path.write_bytes(encode(entries | lists | {"flags": flags}, {}))
    found = read_header(path).metadata
    assert found == {key: value for key, (_, _, value) in values.items()} | lists | {"flags": [False, True, True]}
    assert all(type(found[key]) is type(value) for key, (_, _, value) in values.items())


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 32), (3, 4096)])
def test_tensors_are_where_the_file_says(version: int, alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    first, second = np.arange(32, dtype="<f4"), np.arange(64, dtype="<f2").reshape(4, 16)
    tensors = {"a": ("F32", first.shape, first.tobytes()), "b": ("F16", second.shape, second.tobytes())}
    path.write_bytes(encode({"general.alignment": alignment}, tensors, version=version, alignment=alignment))
    found = read_header(path).tensors
    data = path.read_bytes()
    for name, (kind, shape, content) in tensors.items():
        stored = found[name]
        assert (stored.kind.name, stored.shape) == (kind, shape)
        assert stored.offset % alignment == 0
        assert data[stored.offset : stored.offset + stored.nbytes] == content


def test_a_long_header_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    texts = [str(i) * (i % 50) for i in range(50_000)]
    long = "x" * 3_000_000
    path.write_bytes(encode({"texts": texts, "long": long, "last": 1}, {}))
    assert read_header(path).metadata == {"texts": texts, "long": long, "last": 1}


def test_the_architecture_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    assert read_architecture(path) == "qwen3"
    assert is_gguf(path)
    path.write_bytes(path.read_bytes()[:200])  # what follows does not matter
    assert read_architecture(path) == "qwen3"
    for other in (tmp_path / "none", tmp_path):
        assert read_architecture(other) is None
        assert not is_gguf(other)
    path.write_bytes(b"GGU")
    assert read_architecture(path) is None
    assert not is_gguf(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("pipe.gguf", "zero.gguf"):
        with pytest.raises(CheckpointError, match="it is not a regular file"):
            read_header(tmp_path / name)
        assert not is_gguf(tmp_path / name)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Every byte of the header may be wrong: never anything but a model or one line."""
    small = small_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=16)
    good = encode(metadata(small), plain(small)[0])
    end = good.index(b"output_norm") + 60
    rng = random.Random(18)
    path = tmp_path / "x.gguf"
    refused: list[str] = []
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(end)
            match rng.randrange(5):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at] ^= 1 << rng.randrange(8)
                case 2:
                    data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, HUGE, (1 << 64) - 1, 1 << 31)))
                case 3:
                    del data[at : at + rng.randrange(1, 40)]
                case 4:
                    data[at:at] = rng.randbytes(rng.randrange(1, 40))
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            model = GgufModel([path])
            for file in model.small_files:
                file.read()
        except NpqwenError as error:
            refused.append(str(error))
    assert 150 < len(refused) < 300
    assert [line for line in refused if "\n" in line or len(line) > 600] == []
