"""Saved sessions: round trips, files that are damaged or something else, and saves that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from converted import small_model

from npqwen.engine.cache_type import CacheType
from npqwen.errors import ClosedError, ContextLengthError, FormatError, OutputError
from npqwen.generation.session import Session
from npqwen.model import Model, load

IDS = [int(id) for id in np.random.default_rng(2).integers(0, 4096, 700)]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(4), threads=2) as loaded:
        yield loaded


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    """A snapshot of 300 tokens: one page and 44 positions."""
    session = Session(model)
    session.prefill(IDS[:300])
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 255, 256, 257, 600])
def test_a_loaded_session_continues_like_the_saved_one(
    tiny: Callable[[int], Path], tmp_path: Path, bits: int, length: int
) -> None:
    path = tmp_path / "session"
    with load(tiny(bits), threads=2) as model:
        session = Session(model)
        session.prefill(IDS)  # forgotten again, all but some
        session.prefill(IDS[:length])
        session.save(path)
        expected = model.forward([7], session.cache.fork())
    with load(tiny(bits), threads=1) as model:
        loaded = Session.load(model, path)
        assert loaded.ids == IDS[:length]
        assert np.array_equal(model.forward([7], loaded.cache.fork()), expected)
        stream = loaded.stream([*IDS[:length], 9], max_tokens=3, temperature=0)
        assert stream.usage.cached_tokens == length
        alone = model.generate(model.tokenizer.decode([5]), max_tokens=1)
        assert alone.ids
        list(stream)


def saved_tensors(directory: Path, path: Path, kv: CacheType) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors in a snapshot of 300 tokens, of a model with this type of cache."""
    with load(directory, threads=1, kv=kv) as model:
        session = Session(model)
        session.prefill(IDS[:300])
        session.save(path)
    return dict(safetensors.numpy.load_file(path))


def test_the_file_is_plain_safetensors_and_says_what_it_holds(model: Model, tmp_path: Path) -> None:
    tensors = saved_tensors(model.path, tmp_path / "saved", "f16")
    layers, heads, dim = (
        model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim
    )  # fmt: skip
    assert tensors["ids"].tolist() == IDS[:300]
    assert tensors["page.0"].shape == (layers, 2, heads, 16, 16 * dim)
    assert tensors["page.1"].shape == (layers, 2, heads, 3, 16 * dim)
    assert sorted(tensors) == ["ids", "page.0", "page.1"]
    # The same numbers in the file of another thread count, and zeros after the last token.
    keys = tensors["page.1"][:, 0].reshape(layers, heads, 3, dim, 16)
    values = tensors["page.1"][:, 1].reshape(layers, heads, 3, 16, dim)
    assert keys[:, :, 2, :, :12].any()
    assert not keys[:, :, 2, :, 12:].any()
    assert values[:, :, 2, :12].any()
    assert not values[:, :, 2, 12:].any()
    assert np.isfinite(tensors["page.0"]).all()


def test_positions_of_int8_past_the_last_token_are_zeros(model: Model, tmp_path: Path) -> None:
    tensors = saved_tensors(model.path, tmp_path / "saved", "int8")
    layers, heads, dim = (
        model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim
    )  # fmt: skip
    assert tensors["page.0"].shape == (layers, 2, heads, 8, 32 * (dim + 4))
    assert tensors["page.1"].shape == (layers, 2, heads, 2, 32 * (dim + 4))
    last = tensors["page.1"][:, :, :, 1]  # 12 of its 32 positions
    scales = np.ascontiguousarray(last[..., :128]).view(np.float32)
    assert np.all(scales[..., :12] > 0)
    assert not scales[..., 12:].any()
    keys = last[:, 0, :, 128:].reshape(layers, heads, 2, dim // 4, 16, 4)
    values = last[:, 1, :, 128:].reshape(layers, heads, dim // 16, 8, 16, 4)
    assert np.all(keys[:, :, 0, :, :12].any((2, 4)))
    assert not keys[:, :, 0, :, 12:].any()
    assert not keys[:, :, 1].any()
    assert np.all(values[:, :, :, :3].any((2, 4)))
    assert not values[:, :, :, 3:].any()


def test_saving_is_deterministic_and_replaces(model: Model, saved: Path) -> None:
    session = Session(model)
    session.prefill(IDS[:500])
    session.save(saved)
    assert Session.load(model, saved).ids == IDS[:500]
    session.prefill(IDS[:300])
    session.save(saved)
    again = Session(model)
    again.prefill(IDS[:300])
    again.save(saved.with_name("again"))
    assert saved.read_bytes() == saved.with_name("again").read_bytes()
    assert sorted(os.listdir(saved.parent)) == ["again", "saved"]


def test_an_empty_session(model: Model, tmp_path: Path) -> None:
    Session(model).save(tmp_path / "empty")
    assert Session.load(model, tmp_path / "empty").ids == []


def test_a_running_stream_can_be_saved(model: Model, tmp_path: Path) -> None:
    session = Session(model)
    stream = session.stream(IDS[:40], max_tokens=30, temperature=0, logit_bias={4096: -100, 4098: -100})
    next(stream)
    session.save(tmp_path / "s")
    loaded = Session.load(model, tmp_path / "s")
    assert loaded.ids == session.ids
    whole = stream.completion().ids
    rest = loaded.stream(
        IDS[:40] + whole[:5], max_tokens=25, temperature=0, logit_bias={4096: -100, 4098: -100}
    ).completion()
    assert whole[:5] + rest.ids == whole


def test_the_last_token_drawn_is_saved_though_it_is_not_computed(model: Model, tmp_path: Path) -> None:
    session = Session(model)
    session.stream(IDS[:40], max_tokens=5, seed=1, logit_bias={4096: -100, 4098: -100}).completion()
    session.save(tmp_path / "s")
    loaded = Session.load(model, tmp_path / "s")
    assert (len(session.ids), session.cache.length) == (45, 44)
    assert (loaded.ids, loaded.cache.length) == (session.ids, 44)
    more = loaded.continue_(max_tokens=5, temperature=0).completion()
    assert more.ids == session.continue_(max_tokens=5, temperature=0).completion().ids
    assert more.usage.cached_tokens == 44
    data = (tmp_path / "s").read_bytes()
    for end in range(0, len(data), 9973):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(FormatError, match="truncated or not a saved session"):
            Session.load(model, tmp_path / "cut")


def test_a_save_that_fails_leaves_the_old_file_alone(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model)
    session.prefill(IDS[:20])
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="saved does not fit: no room is left on the disk"):
        session.save(saved)
    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.save(saved)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OutputError, match=r"saved needs \d+ MB, but only 0 MB are free there"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["saved"]


def test_paths_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    session = Session(model)
    for directory in (tmp_path, "/", "."):
        with pytest.raises(OutputError, match="is a directory"):
            session.save(directory)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        session.save(tmp_path / "file" / "session")


KILLED = """
import sys
from pathlib import Path
from npqwen.model import load
from npqwen.generation.session import Session
model = load(Path(sys.argv[1]), threads=1)
session = Session(model)
session.prefill([7] * 700)
print("saving", flush=True)
while True:
    session.save(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_sigkill_leaves_a_complete_file(model: Model, saved: Path, delay: float) -> None:
    command = [sys.executable, "-c", KILLED, str(model.path), str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert Session.load(model, saved).ids in (IDS[:300], [7] * 700)


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, head: Any, data: bytes) -> None:
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_any_truncation_is_noticed(model: Model, saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 5, 8, 50, 1000, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(FormatError, match="truncated or not a saved session"):
            Session.load(model, saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="truncated or not a saved session"):
        Session.load(model, saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head["__metadata__"].update(format="npqwen"), "is not a saved session"),
        (lambda head: head.pop("__metadata__"), "not a saved session"),
        (lambda head: head.update(__metadata__=[1]), "not a saved session"),
        (lambda head: head["__metadata__"].update(format_version="2"), "format version '2'; this npqwen reads 1"),
        (lambda head: head["__metadata__"].update(fingerprint="0" * 64), "another model, other weights or"),
        (lambda head: head["__metadata__"].update(more="1"), "truncated or not a saved session"),
        (lambda head: head.pop("ids"), "truncated or not a saved session"),
        (lambda head: head.update(ids=None), "truncated or not a saved session"),
        (lambda head: head["ids"].update(shape=[]), "truncated or not a saved session"),
        (lambda head: head["ids"].update(shape=[-1]), "truncated or not a saved session"),
        (lambda head: head["ids"].update(shape=["300"]), "truncated or not a saved session"),
        (lambda head: head["ids"].update(shape=[299]), "truncated or not a saved session"),
        (lambda head: head["ids"].update(shape=[2**40]), "truncated or not a saved session"),
        (lambda head: head["page.0"].update(dtype="F32"), "truncated or not a saved session"),
        (lambda head: head["page.0"].update(dtype="U16"), "truncated or not a saved session"),
        (lambda head: head["page.0"].update(dtype="I8"), "truncated or not a saved session"),
        (lambda head: head["page.1"].update(data_offsets=[0, 10]), "truncated or not a saved session"),
        (lambda head: head.pop("page.1"), "truncated or not a saved session"),
        (lambda head: head.update({"page.0": 7}), "truncated or not a saved session"),
    ],
)
def test_wrong_headers_are_refused(
    model: Model, saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    head, data = header(saved)
    change(head)
    rewrite(saved, head, data)
    with pytest.raises((FormatError, ContextLengthError), match=message) as raised:
        Session.load(model, saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"7", b"\xff\xfe", b"[" * 100_000, b'{"ids": {"shape": [1]}}'])
def test_headers_that_are_not_json_objects(model: Model, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(FormatError, match="not a saved session"):
        Session.load(model, path)


@pytest.mark.parametrize("wrong", [-1, 4128, 2**31 - 1])
def test_ids_that_the_model_does_not_have(model: Model, saved: Path, wrong: int) -> None:
    head, data = header(saved)
    rewrite(saved, head, data[:8] + struct.pack("<i", wrong) + data[12:])
    with pytest.raises(FormatError, match="truncated or not a saved session"):
        Session.load(model, saved)


def test_files_that_are_something_else(model: Model, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a saved session"):
        Session.load(model, model.path / "model.safetensors")
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        Session.load(model, tmp_path / "missing")
    with pytest.raises(FormatError, match="cannot be read"):
        Session.load(model, tmp_path)


def test_a_context_shorter_than_the_session_is_refused(model: Model, saved: Path) -> None:
    with load(model.path, threads=1, context=300) as exact:
        assert Session.load(exact, saved).ids == IDS[:300]
    with (
        load(model.path, threads=1, context=299) as short,
        pytest.raises(ContextLengthError, match="holds 300 tokens and the context is 299"),
    ):
        Session.load(short, saved)


def test_other_weights_other_config_or_other_bits_are_refused(
    model: Model, saved: Path, tmp_path: Path, tiny: Callable[[int], Path]
) -> None:
    with load(tiny(8), threads=1) as other, pytest.raises(FormatError, match="another model"):
        Session.load(other, saved)
    with load(tiny(16), threads=1) as other, pytest.raises(FormatError, match="in int8, but this model uses f32"):
        Session.load(other, saved)
    copied = tmp_path / "copied"
    shutil.copytree(model.path, copied)
    with load(copied, threads=1) as same:
        assert same.fingerprint == model.fingerprint
        assert Session.load(same, saved).ids == IDS[:300]
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    with load(copied, threads=1) as other, pytest.raises(FormatError, match="another model"):
        Session.load(other, saved)


def test_every_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    directory = small_model(tmp_path / "small")
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    head.pop("__metadata__")

    def found() -> str:
        with load(directory, threads=1) as model:
            return model.fingerprint

    seen = {found()}
    for name, entry in head.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        # A codebook is refused unless all repetitions of its 16 values are equal.
        for at in range(start, end if name.endswith(".codebook") else start + 1, 16):
            data[at] ^= 1
        file.write_bytes(data)
        seen.add(found())
    assert len(seen) == 1 + len(head)


def test_a_closed_model_has_no_fingerprint(tiny: Callable[[int], Path]) -> None:
    model = load(tiny(4), threads=1)
    model.close()
    with pytest.raises(ClosedError):
        _ = model.fingerprint
