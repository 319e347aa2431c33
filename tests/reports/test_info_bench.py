"""`npqwen info` and `npqwen bench`: numbers counted by hand, and the shape of the output."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_config
from converted import MATRICES, small_model, tensors, write_model
from units import CODEBOOKS, row_bytes

from npqwen import OptionError
from npqwen.model import load
from npqwen.reports.bandwidth import ReadBandwidth
from npqwen.reports.bench import benchmark, bytes_per_token
from npqwen.reports.info import inspect
from npqwen.simd.isa import ISA
from npqwen.wording import size

Run = Callable[..., tuple[str, str]]


def data_bytes(directory: Path) -> int:
    """Of model.safetensors, the header left out."""
    raw = (directory / "model.safetensors").read_bytes()
    return len(raw) - 8 - int(struct.unpack("<Q", raw[:8])[0])


def test_parts_of_a_model_counted_by_hand(tmp_path: Path) -> None:
    """Untied, every matrix in another encoding: 1088, 2112 or 4096 bytes for 16 x 128 weights."""
    config = make_config(tie_word_embeddings=False)  # hidden 72, inner 100, heads 4 + 2 of 32, vocab 203, 2 layers
    bits = dict(zip(MATRICES, (8, 4, 4, 16, 8, 4, 16), strict=True))
    path = write_model(tmp_path / "model", config, tensors(config, bits), 4)
    info = inspect(path)
    vocabulary, hidden = 13, 5  # groups of rows; one unit covers each row
    int4, int8, bf16, codebook = 64 + 1088, 64 + 2112, 4096, 64
    assert info.parts == {
        "embedding": vocabulary * int8,
        "attention": 2 * (2 * codebook + 16 * int4 + hidden * bf16),
        "feed-forward": 2 * (codebook + 14 * int8 + hidden * int4),
        "norms": 4 * (80 + 2 * (80 + 32 + 32 + 80)),
        "output": vocabulary * bf16,
    }
    assert info.weights == sum(info.parts.values()) == data_bytes(path)
    assert info.encodings == ["int4", "int8", "bf16"]
    weights = 2 * 203 * 72 + 2 * (72 * 32 * (4 + 2 + 2) + 4 * 32 * 72 + 3 * 72 * 100)
    assert info.parameters == weights + 72 + 2 * (72 + 72 + 32 + 32)
    assert info.bits_per_weight == pytest.approx(8 * (info.weights - info.parts["norms"]) / weights)
    assert info.bits == 4


def test_unknown_tensors_are_no_part(tmp_path: Path) -> None:
    config = make_config()
    made = tensors(config, dict.fromkeys(MATRICES, 4))
    parts = inspect(write_model(tmp_path / "model", config, made, 4)).parts
    more = {**made, "extra": np.zeros(16, np.float32), "norm": np.zeros(16, np.float32)}
    assert inspect(write_model(tmp_path / "more", config, more, 4)).parts == parts


def tiny_bits(recipe: Mapping[str, str]) -> float:
    """Bits per weight of the example by a recipe: the encoding of each matrix by its role, or of the "others".

    All of its sizes are multiples of 128.
    """
    layer = {"qk": (768, 256), "v": (256, 256), "o": (256, 512), "gate_up": (1536, 256), "down": (256, 768)}
    stored = weights = 0
    for role, (rows, columns) in [("embed", (4128, 256)), *4 * list(layer.items())]:
        encoding = recipe.get(role, recipe["others"])
        stored += rows // 16 * row_bytes(encoding, columns // 128) + (64 if encoding in CODEBOOKS else 0)
        weights += rows * columns
    return 8 * stored / weights


RECIPES = {4: {"others": "int4", "v": "int6", "embed": "int5"}, 8: {"others": "int8"}, 16: {"others": "bf16"}}


@pytest.mark.parametrize("bits", RECIPES)
def test_bits_per_weight(tiny: Callable[[int], Path], bits: int) -> None:
    info = inspect(tiny(bits))
    assert info.bits_per_weight == pytest.approx(tiny_bits(RECIPES[bits]))
    assert info.weights == sum(info.parts.values()) == data_bytes(tiny(bits))
    assert "output" not in info.parts  # tied
    # 4 layers of 2 heads of 128, keys and values, float16 or for bf16 float32.
    assert info.cache == 2048 * 4 * 2 * 2 * (128 * 4 if bits == 16 else 128 + 4)
    assert inspect(tiny(bits), context=100).cache == info.cache // 8  # a page of 256
    assert info.needed == info.weights + info.cache + info.working


def test_info_for_programs(run: Run, tiny: Callable[[int], Path]) -> None:
    out, err = run("info", tiny(4), "--context", "512", "--json")
    assert err == ""
    found = json.loads(out)
    assert found["path"] == str(tiny(4))
    assert found["config"]["hidden_size"] == 256
    assert (found["bits"], found["context"]) == (4, 512)
    assert found["bits_per_weight"] == pytest.approx(tiny_bits(RECIPES[4]))
    assert sum(found["parts"].values()) == found["weights"] == data_bytes(tiny(4))
    assert found["needed"] == found["weights"] + found["cache"] + found["working"]
    assert found["kernels"] == ISA.name
    assert "portable" in found["kernels_available"]
    assert found["threads"] >= 1


def test_info_for_people(run: Run, tiny: Callable[[int], Path]) -> None:
    out, err = run("info", tiny(8))
    assert err == ""
    lines = [line.strip().split(None, 1) for line in out.splitlines()]
    for expected in (
        ["type", "qwen3, 5.0M parameters"],
        ["layers", "4 of width 256, feed-forward 768"],
        ["attention", "4 query and 2 key/value heads of 128"],
        ["encoding", "int8; 8.36 bits per weight"],
        ["embedding", "1.1 MB"],
        ["weights", "5.2 MB, mapped from the files"],
        ["cache", "4.3 MB at 2048 tokens of context, in int8"],
    ):
        assert expected in lines
    assert lines[-1][1].startswith(f"{ISA.name} (this processor offers ")
    assert all(len(line) < 200 for line in out.splitlines())


def test_info_of_a_checkpoint_converts_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints import write_checkpoint

    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "checkpoint", tokenizer=True)
    options = ["--bits", "8", "--context", "100", "--kv", "f16"]
    out, err = run("info", tmp_path / "checkpoint", *options, "--json")
    planned = json.loads(out)
    assert err == f"{tmp_path / 'checkpoint'} is not converted yet; this is what a conversion will give and need\n"
    assert not (tmp_path / "cache" / "models").exists()
    shown, _ = run("info", tmp_path / "checkpoint", *options)
    assert "\n  cache " in shown
    run("pull", tmp_path / "checkpoint", "--bits", "8")
    found = json.loads(run("info", tmp_path / "checkpoint", *options, "--json")[0])
    for name in ("bits", "weights", "context", "kv", "cache"):
        assert planned[name] == found[name]


@pytest.mark.parametrize("options", [["--context", "0"], ["--context", "99999"], ["--bits", "8"], ["--nonsense"]])
def test_info_refuses(run: Run, tiny: Callable[[int], Path], options: list[str]) -> None:
    out, err = run("info", tiny(4), *options, status=2)
    assert out == ""
    assert re.fullmatch(r"npqwen: error: .*\n", err)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (335_000_000, "335 MB"), (4_700_000_000, "4.7 GB"),
        (999_499, "999 kB"), (999_600, "1.0 MB"), (1_234_000_000_000, "1.23 TB"),
    ],
)  # fmt: skip
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_bench_for_programs(run: Run, tiny: Callable[[int], Path]) -> None:
    load(tiny(4)).close()  # compiling kernels would print progress
    args = ["--prefill", "8,300", "--decode", "3", "--depth", "0,20", "--repeat", "2", "--threads", "2"]
    out, err = run("bench", tiny(4), *args, "--json")
    assert err == ""
    report = json.loads(out)
    assert report["model"] == str(tiny(4))
    assert (report["bits"], report["encoding"], report["threads"], report["kernels"]) == (4, "int4", [2], ISA.name)
    assert report["weights"] == data_bytes(tiny(4))
    (bandwidth,) = report["read_bandwidth"]
    assert 1e8 < bandwidth < 1e13
    tests = [(m["test"], m["tokens"], m["depth"]) for m in report["measures"]]
    at = [[("prefill", 8, d), ("prefill", 300, d)] for d in (0, 20)]
    assert sorted(tests) == sorted([*at[0], *at[1], ("decode", 3, 0), ("decode", 3, 20)])
    for measure in report["measures"]:
        assert len(measure["rates"]) == measure["threads"] == 2
        assert min(measure["rates"]) > 0
        assert min(measure["rates"]) <= measure["median"] <= max(measure["rates"])
        assert (measure["bandwidth_share"] > 0) == (measure["test"] == "decode")
    # A token at position 21 reads all weights, and 21 positions of float16 keys and values.
    (deep,) = (m for m in report["measures"] if (m["test"], m["depth"]) == ("decode", 20))
    assert deep["bytes_per_token"] == report["weights"] + 21 * 4 * 2 * 2 * (128 + 4)


def test_bench_for_people(run: Run, tiny: Callable[[int], Path]) -> None:
    out, _ = run("bench", tiny(16), "--prefill", "5", "--decode", "2", "--repeat", "1", "--threads", "1")
    lines = out.splitlines()
    assert lines[0] == f"{tiny(16)}: bf16"
    assert f", {ISA.name} kernels" in lines[1]
    assert re.fullmatch(r"memory reads \d+\.\d GB/s with 1 thread(; \d+% of the weights are in huge pages)?", lines[2])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert len({len(row) for row in rows}) == 1  # a table of Markdown has as many cells in every row
    assert [row[:3] for row in rows[2:]] == [["prefill 5", "0", "1"], ["decode 2", "0", "1"]]


def test_bench_of_several_numbers_of_threads(run: Run, tiny: Callable[[int], Path], tmp_path: Path) -> None:
    load(tiny(4)).close()
    report = tmp_path / "shared.md"
    args = ["bench", tiny(4), "-p", "5", "-n", "2", "-d", "3", "-r", "1", "--threads", "1,2"]
    out, err = run(*args, "--report", report)
    assert err == f"report written to {report}\n"
    *_, bandwidth, _, head, _, first, second, third, fourth = out.splitlines()
    assert re.match(r"memory reads \d+\.\d GB/s with 1 thread, \d+\.\d GB/s with 2 threads", bandwidth)
    assert head.startswith("| test | depth | threads | tokens/s")
    rows = [row.split("|")[1:4] for row in (first, second, third, fourth)]
    assert rows == [[f" {test} ", " 3 ", f" {n} "] for n in (1, 2) for test in ("prefill 5", "decode 2")]
    assert first in report.read_text(encoding="utf-8")
    assert fourth in report.read_text(encoding="utf-8")

    found = json.loads(run(*args, "--json")[0])
    assert found["threads"] == [1, 2]
    assert len(found["read_bandwidth"]) == 2
    assert [(m["threads"], m["test"]) for m in found["measures"]] == [
        (1, "prefill"), (1, "decode"), (2, "prefill"), (2, "decode"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeat", "0"], "Invalid value for '--repeat' / '-r': 0 is not in the range x>=1"),
        (["--threads", "1,0"], "Invalid value for '--threads' / '-t': 0 is too small: it must be at least 1"),
        (["--threads", "1,,2"], "'1,,2' is not a list of numbers such as 1,2,4"),
        (["--depth", "-5"], "-5 is too small: it must be at least 0"),
    ],
)
def test_bench_refuses_before_it_opens_the_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("npqwen.hub.resolve", None)
    out, err = run("bench", "m", *options, status=2)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_bench_refuses_a_number_of_threads_before_it_measures(run: Run, tiny: Callable[[int], Path]) -> None:
    """Too many for the engine, after one that it could run."""
    out, err = run("bench", tiny(4), "--threads", "1,5000", "--decode", "9999", status=2)
    assert (out, err) == ("", "npqwen: error: threads is 5000; it must be a whole number from 1 to 1024\n")


@pytest.mark.parametrize(
    ("part", "shown"),
    [(None, ""), (0.0, "; 0% of the weights are in huge pages"), (0.5, "; 50% of the weights are in huge pages")],
)
def test_bench_reports_the_share_of_huge_pages(
    run: Run, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, part: float | None, shown: str
) -> None:
    found = None if part is None else int(part * data_bytes(tiny(4)))
    monkeypatch.setattr("npqwen.reports.bench.huge_page_bytes", lambda paths: found)
    args = ["--prefill", "2", "--decode", "0", "--repeat", "1", "--threads", "1"]
    out, _ = run("bench", tiny(4), *args)
    assert re.fullmatch(r"memory reads \d+\.\d GB/s with 1 thread" + shown, out.splitlines()[2])
    assert json.loads(run("bench", tiny(4), *args, "--json")[0])["huge_pages"] == found


@pytest.mark.parametrize(
    "options",
    [["--repeat", "0"], ["--prefill", "-1"], ["--prefill", "99999"], ["--depth", "2048"], ["--decode", "a"]],
)
def test_bench_refuses(run: Run, tiny: Callable[[int], Path], options: list[str]) -> None:
    out, err = run("bench", tiny(4), "--threads", "1", *options, status=2)
    assert out == ""
    assert re.fullmatch(r"npqwen: error: .*\n", err)


def test_bench_reports_its_progress(tiny: Callable[[int], Path]) -> None:
    calls: list[tuple[int, int]] = []
    with load(tiny(4), threads=2) as model:
        benchmark(model, [4], [2], [0], 2, progress=lambda done, total: calls.append((done, total)))
        assert calls == [(n, 6) for n in range(1, 7)]
        with pytest.raises(OptionError):
            benchmark(model, [4], repeat=0)


def test_bytes_per_token_of_an_untied_embedding(tmp_path: Path) -> None:
    """Its table is not read whole for one row; the output's is."""
    path = small_model(tmp_path / "model", 8, tie_word_embeddings=False)
    with load(path, threads=1) as model:
        assert bytes_per_token(model, 0) == data_bytes(path) - 13 * (64 + 2112)


def test_read_bandwidth() -> None:
    for threads in (1, 2):
        with ReadBandwidth(threads, size=1 << 24) as memory:
            assert 1e8 < memory.measure() < 1e13


@pytest.mark.parametrize(
    ("available", "size"), [(None, 1 << 28), (1 << 40, 1 << 28), (400_001_000, 100_000_000 // 512 * 512), (0, 1 << 20)]
)
def test_measuring_bandwidth_takes_part_of_the_available_memory(
    available: int | None, size: int, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def small(self: ReadBandwidth, threads: int, size: int) -> None:
        taken.append(size)
        raise MemoryError

    monkeypatch.setattr("npqwen.reports.bench.available_memory", lambda: available)
    monkeypatch.setattr(ReadBandwidth, "__init__", small)
    with load(tiny(4), threads=1) as model, pytest.raises(MemoryError):
        benchmark(model, [4])
    assert taken == [size]


def test_a_share_is_of_the_bandwidth_measured_just_before(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.cycle([1e9, 2e9, 8e9])  # the first goes with the uncounted run
    monkeypatch.setattr(ReadBandwidth, "measure", lambda self: next(readings))
    with load(tiny(4), threads=1) as model:
        (measure,) = benchmark(model, prefill=(), decode=(2,), repeat=2).measures
    shares = np.array(measure.rates) * measure.bytes_per_token / [2e9, 8e9]
    assert measure.bandwidth_share == pytest.approx(shares.mean())
