#!/usr/bin/env python3
"""Convert and run the shapes of the largest mixtures of experts, a few layers deep, and compare with NumPy.

    python tests/bench/giant_shapes.py build/giant --sizes 235B-A22B,Coder-480B-A35B --layers 2 --bits 4,8

For sizes that no test can afford: tensors past 4 GiB, source files past 2**32 bytes, 160 experts, 96 heads. The
checkpoint is one sparse file: `--live` experts of each layer, the first and the last among them, are random, and so
are the first and last rows of the embedding and of the output matrix; the rest is a hole that reads as zeros. Each
token of those rows chooses its own live experts by a wide margin.

For each size and number of bits this converts in a separate process and prints its peak memory; runs a prompt in one
pass and token by token; and compares the logits of the live rows with tests/reference.py on the checkpoint and, for
scale, with the reference when every expert is replaced by the next live one. It exits with status 1 if anything is
wrong. A layer of Coder-480B takes 8 GB of disk at 8 bits, 4.3 GB at 4; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from make_checkpoint import GENERATION, SIZES, TINY, TOKENIZER_FILES, tensors
from npqwen_quant import convert
from peak import memory

from npqwen.format.config import Config
from npqwen.format.safetensors import read_header
from npqwen.model import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import ReferenceModel, qwen3_in_numpy

ROWS = 48
"""Nonzero rows at each end of the vocabulary."""
PROMPT = 24
# Largest relative difference of a token's logits from those of unquantized weights; normal random weights are hard to
# quantize.
TOLERANCE = {4: 0.5, 8: 0.05, 16: 0.001}
# Bound on the peak memory of conversion in bytes, as for a dense model.
PEAK = 400 << 20


def live_experts(config: Mapping[str, Any], count: int) -> npt.NDArray[np.int64]:
    """Indices of the experts that are not holes, spread from the first to the last."""
    return np.linspace(0, config["num_experts"] - 1, count).astype(np.int64)


def live_ids(config: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """The token ids whose rows are not holes."""
    last = config["vocab_size"]
    return np.concatenate([np.arange(ROWS), np.arange(last - ROWS, last)])


def write_checkpoint(config: dict[str, Any], out: Path, live: int, seed: int = 0) -> None:
    """Write one sparse safetensors file and the small files of a checkpoint."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, out / name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors(config):
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    experts = live_experts(config, live)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, entry in header.items():
            if name != "__metadata__":
                for row, values in _live_rows(name, tuple(entry["shape"]), config, experts, rng):
                    file.seek(start + entry["data_offsets"][0] + 2 * row * values.shape[-1])
                    file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def _live_rows(
    name: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    experts: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The nonzero parts of a tensor: (index of the first row, rows in float32)."""
    if len(shape) == 1:
        yield 0, 1 + 0.1 * rng.standard_normal(shape, dtype=np.float32)
        return
    parts = name.split(".")
    if "experts" in parts and int(parts[parts.index("experts") + 1]) not in experts:
        return
    if name.endswith("mlp.gate.weight"):
        # Column j selects one live expert, a different one in each layer.
        layer = int(parts[2])
        for j in range(len(experts)):
            row = np.zeros((1, shape[1]), np.float32)
            row[0, j] = 1
            yield int(experts[(j + 5 * layer) % len(experts)]), row
    elif name in ("model.embed_tokens.weight", "lm_head.weight"):
        for first in (0, shape[0] - ROWS):
            rows = rng.standard_normal((ROWS, shape[1]), dtype=np.float32)
            if name == "lm_head.weight":
                rows /= np.float32(np.sqrt(shape[1]))
            else:
                wanted = rng.permuted(np.tile(np.arange(len(experts)), (ROWS, 1)), axis=1)
                rows[:, : len(experts)] = 0
                chosen = wanted[:, : config["num_experts_per_tok"]]
                np.put_along_axis(rows, chosen, 7 + 2 * rng.random(chosen.shape, dtype=np.float32), axis=1)
            yield first, rows
    else:
        # Experts must be large enough to count beside the embedding's large columns.
        deviation = (5 if "experts" in parts and "down_proj" in parts else 0.7) / np.sqrt(shape[1])
        step = max(1, (1 << 24) // shape[1])
        for first in range(0, shape[0], step):
            rows = rng.standard_normal((min(step, shape[0] - first), shape[1]), dtype=np.float32)
            yield first, rows * np.float32(deviation)


class Mapped(Mapping[str, npt.NDArray[np.float32]]):
    """A checkpoint's tensors as float32, converted at every access."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._tensors = read_header(file).tensors

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        bits = np.memmap(self._path, "<u2", "r", tensor.offset, tensor.shape)
        values = np.empty(bits.shape, np.uint32)
        step = max(1, (1 << 26) // max(1, bits[0].size))
        for first in range(0, len(bits), step):
            values[first : first + step] = bits[first : first + step]
        values <<= 16
        return values.view(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Reference(ReferenceModel):
    """The reference, reading each chosen expert once. taken: replacements of chosen experts by others."""

    def __init__(self, config: Config, weights: Mapping[str, npt.NDArray[np.float32]], taken: dict[int, int]) -> None:
        super().__init__(config, weights)
        self.chosen: set[tuple[str, int]] = set()
        self._taken = taken

    def forward(self, *args: Any, **options: Any) -> npt.NDArray[np.float32]:
        with mock.patch.object(qwen3_in_numpy, "mixture_of_experts", self._mixture):
            return super().forward(*args, **options)

    def _mixture(
        self, config: Config, weights: Mapping[str, Any], mlp: str, x: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        mixture = config.mixture
        assert mixture is not None
        router = qwen3_in_numpy.softmax(x @ weights[mlp + "gate.weight"].T)
        order = np.argsort(-router, axis=1, kind="stable")[:, : mixture.num_experts_per_tok]
        kept = np.zeros_like(router)
        np.put_along_axis(kept, order, np.take_along_axis(router, order, axis=1), axis=1)
        if mixture.norm_topk_prob:
            kept /= kept.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for e in np.flatnonzero(kept.any(axis=0)):
            self.chosen.add((mlp, int(e)))
            tokens = np.flatnonzero(kept[:, e])
            expert = f"{mlp}experts.{self._taken.get(int(e), e)}."
            out[tokens] += kept[tokens, e, None] * qwen3_in_numpy.feed_forward(weights, expert, x[tokens])
        return out


def converted(source: Path, out: Path, bits: int) -> tuple[int, float]:
    """Convert in a separate process. Returns its peak memory in bytes and its seconds."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "convert", str(source), str(out), str(bits)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout), time.perf_counter() - start


def difference(found: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Relative difference of each token's logits."""
    return np.asarray(np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1))


def compare(
    source: Path,
    out: Path,
    bits: int,
    ids: npt.NDArray[np.int64],
    want: npt.NDArray[np.float32],
    wrong: npt.NDArray[np.float32],
) -> list[str]:
    """Compare a converted model with the reference and print the result. Returns problems."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    live = live_ids(config)
    dead = np.setdiff1d(np.arange(0, config["vocab_size"], 997), live)
    with load(out, context=512) as model:
        largest = max(model.weights.tensors.items(), key=lambda item: item[1].data.size)
        start = time.perf_counter()
        together = model.logits(ids)
        first = time.perf_counter() - start
        cache = model.new_cache()
        start = time.perf_counter()
        stepped = np.concatenate([model.forward([i], cache) for i in ids])
        later = (time.perf_counter() - start) / len(ids)
        # The widest tiles, many tokens an expert.
        long = model.logits(np.tile(ids, 9))[: len(ids)]
    error = difference(together[:, live], want)
    print(
        f"  {bits} bits: {largest[0]} of {largest[1].data.size:,} bytes; {len(ids)} tokens in {first:.1f} s, then "
        f"{later:.2f} s each; largest relative difference of a token's logits {error.max():.4f}",
        flush=True,
    )
    problems = []
    if error.max() > TOLERANCE[bits]:
        problems.append(f"{bits} bits: logits differ by {error.max():.3f}, more than {TOLERANCE[bits]}")
    if (difference(together[:, live], wrong) < 1.5 * error).any():
        problems.append(f"{bits} bits: some logits are as near to those with the wrong experts")
    if together[:, dead].any():
        problems.append(f"{bits} bits: rows of zeros give logits")
    for name, other in (("token by token", stepped), ("in a longer prompt", long)):
        if not np.allclose(other, together, atol=1e-3):
            problems.append(f"{bits} bits: {name} the logits differ by {np.abs(other - together).max():.4f}")
    return problems


def check(size: str, options: argparse.Namespace) -> list[str]:
    """Create, convert, run and remove one size. Returns problems."""
    config = dict(SIZES[size]) | {"num_hidden_layers": options.layers, "max_window_layers": options.layers}
    source = options.work / size
    problems = []
    try:
        write_checkpoint(config, source, options.live)
        weights = Mapped(source / "model.safetensors")
        file = (source / "model.safetensors").stat()
        print(
            f"{size}, {options.layers} layers: a source of {file.st_size / 1e9:.1f} GB, "
            f"{file.st_blocks * 512 / 1e9:.1f} on disk; {config['num_experts']} experts, {options.live} of them live",
            flush=True,
        )
        ids = np.random.default_rng(1).choice(live_ids(config), PROMPT)
        live, parsed = live_experts(config, options.live), Config.from_directory(source)
        reference = Reference(parsed, weights, {})
        want = reference.logits(ids)[:, live_ids(config)]
        neighbours = dict(zip(live.tolist(), np.roll(live, 1).tolist(), strict=True))
        wrong = Reference(parsed, weights, neighbours).logits(ids)[:, live_ids(config)]
        scale = difference(wrong, want).min()
        print(
            f"  the reference chose {len(reference.chosen)} experts in {options.layers} layers; "
            f"with the wrong ones its logits differ by {scale:.2f} at least",
            flush=True,
        )
        if len(reference.chosen) != options.live * options.layers:
            problems.append(f"{size}: not every live expert was chosen; give fewer --live")
        for bits in options.bits:
            out = options.work / f"{size}-{bits}"
            try:
                peak, seconds = converted(source, out, bits)
                print(f"  {bits} bits: converted in {seconds:.0f} s, peak memory {peak / 1e6:.0f} MB", flush=True)
                if peak > PEAK:
                    problems.append(f"{size}: conversion took {peak / 1e6:.0f} MB")
                problems += [f"{size}: {problem}" for problem in compare(source, out, bits, ids, want, wrong)]
            finally:
                shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    return problems


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["convert"]:
        source, out, bits = arguments[1:]
        convert(Path(source), Path(out), int(bits))
        print(memory())
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a directory on a file system with sparse files")
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["235B-A22B", "Coder-480B-A35B"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[4, 8])
    parser.add_argument("--live", type=int, default=16, help="experts per layer that are not zero")
    options = parser.parse_args(arguments)
    problems = [problem for size in options.sizes for problem in check(size, options)]
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
