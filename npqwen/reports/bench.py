"""Speed of a model on this machine, and the share of the memory bandwidth that decoding reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from npqwen import __version__
from npqwen.errors import OptionError
from npqwen.hardware.machine import available_memory, processor
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.paging import huge_page_bytes
from npqwen.model import Model
from npqwen.reports.bandwidth import ReadBandwidth
from npqwen.reports.info import active_bytes
from npqwen.simd.isa import ISA
from npqwen.wording import counted


@dataclass(frozen=True)
class Measure:
    """One test and its speed in every repetition."""

    test: str
    """`prefill` or `decode`."""
    tokens: int
    depth: int
    """Tokens in the cache at the start."""
    threads: int
    rates: list[float]
    """Tokens per second."""
    bytes_per_token: int
    """Bytes of weights and cache that decoding one token reads; 0 for prefill."""
    bandwidth_share: float
    """Read rate as a share of the machine's read bandwidth just before: the median; 0 for prefill."""

    @property
    def median(self) -> float:
        """Median tokens per second."""
        return float(np.median(self.rates))


@dataclass(frozen=True)
class Report:
    """A model's speed, with one or several thread counts, and the machine it was measured on."""

    model: str
    bits: int
    """The recipe's nominal bits per weight."""
    encoding: str
    """The recipe's name, such as "int4"."""
    weights: int
    """Bytes."""
    threads: list[int]
    """The thread counts that were measured."""
    kernels: str
    processor: str
    version: str
    read_bandwidth: list[float]
    """Bytes per second with each thread count: the median of all measurements."""
    huge_pages: int | None
    """Bytes of the weights that are mapped by huge pages, which are faster to read; None if unknown."""
    measures: list[Measure]

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Merge reports that differ only in their thread counts into one."""
        return replace(
            reports[-1],
            threads=[threads for report in reports for threads in report.threads],
            read_bandwidth=[bandwidth for report in reports for bandwidth in report.read_bandwidth],
            measures=[measure for report in reports for measure in report.measures],
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields and the medians, for JSON."""
        report = asdict(self)
        for entry, measure in zip(report["measures"], self.measures, strict=True):
            entry["median"] = measure.median
        return report

    def as_markdown(self) -> str:
        """The machine and a table of the measures."""
        pages = ""
        if self.huge_pages is not None:
            pages = f"; {min(1.0, self.huge_pages / self.weights):.0%} of the weights are in huge pages"
        lines = [
            f"{self.model}: {self.encoding}",
            f"{self.processor}, {self.kernels} kernels, npqwen {self.version}",
            f"memory reads {bandwidths(self.threads, self.read_bandwidth)}{pages}",
            "",
            *table(self.as_dict()["measures"]),
        ]
        return "\n".join(lines)


def bandwidths(threads: list[int], rates: list[float]) -> str:
    """Read bandwidths, in bytes per second, with these thread counts, as text: "10.1 GB/s with 1 thread, ..."."""
    return ", ".join(
        f"{rate / 1e9:.1f} GB/s with {counted(count, 'thread')}"
        for count, rate in zip(threads, rates, strict=True)
    )


def table(measures: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of the measures, as `Report.as_dict` has them."""
    lines = [
        "| test | depth | threads | tokens/s (median) | min - max | MB a token | share of bandwidth |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for m in measures:
        spread = f"{min(m['rates']):.1f} - {max(m['rates']):.1f}"
        read = m["bytes_per_token"]
        memory = f"{read / 1e6:.0f} | {m['bandwidth_share']:.0%}" if read else " | "
        cells = f"{m['test']} {m['tokens']}", m["depth"], m["threads"], f"{m['median']:.1f}", spread, memory
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def benchmark(
    model: Model,
    prefill: Sequence[int] = (512,),
    decode: Sequence[int] = (64,),
    depth: Sequence[int] = (0,),
    repeat: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure prefill and decoding at every depth, `repeat` times each after one warm-up run.

    prefill, decode: numbers of tokens. depth: tokens in the cache at the start. The tokens are random: speed does not
    depend on them. progress(done, total) is called after every run. Raises OptionError for lengths that do not fit
    the model's context.
    """
    if repeat < 1 or min([*prefill, *decode, *depth, 0]) < 0:
        raise OptionError("lengths and depths must be at least 0, repetitions at least 1")
    tests = [("prefill", n, d) for d in depth for n in prefill if n]
    tests += [("decode", n, d) for d in depth for n in decode if n]
    longest = max((n + d for _, n, d in tests), default=0)
    if longest > model.context:
        raise OptionError(
            f"{longest:,} tokens do not fit the model's context of {model.context:,}; reduce depth, prefill or decode "
            "(--depth, --prefill, --decode)"
        )
    ids = np.random.default_rng(0).integers(0, min(len(model.tokenizer), model.config.vocab_size), longest + 1)
    done = 0
    readings: list[float] = []
    measures = []
    logits = np.empty((1, model.config.vocab_size), np.float32)
    with ReadBandwidth(model.threads, bytes_to_read()) as memory:
        for test, tokens, before in tests:
            cache = model.new_cache(before + tokens)
            if before:
                model.prefill(ids[:before], cache)
                cache.keep_checkpoint()
            read = bytes_per_token(model, before + tokens // 2) if test == "decode" else 0
            rates, shares = [], []
            for turn in range(repeat + 1):
                # The machine's speed drifts: compare with the bandwidth measured at the same time.
                readings.append(memory.measure())
                cache.truncate(before)
                start = time.perf_counter()
                if test == "prefill":
                    model.prefill(ids[before : before + tokens], cache)
                else:
                    for i in range(before, before + tokens):
                        model.forward(ids[i : i + 1], cache, out=logits)
                if turn:
                    rates.append(tokens / (time.perf_counter() - start))
                    shares.append(rates[-1] * read / readings[-1])
                done += 1
                if progress is not None:
                    progress(done, len(tests) * (repeat + 1))
            measures.append(Measure(test, tokens, before, model.threads, rates, read, float(np.median(shares))))
        readings.append(memory.measure())
    return Report(
        model=str(model.path),
        bits=model.bits,
        encoding=model.weights.quantization.recipe.name,
        weights=model.weight_bytes,
        threads=[model.threads],
        kernels=ISA.name,
        processor=processor(),
        version=__version__,
        read_bandwidth=[float(np.median(readings))],
        huge_pages=huge_page_bytes(model.weights.paths),
        measures=measures,
    )


def bytes_to_read() -> int:
    """Size of the array for measuring bandwidth: 256 MiB, at most a quarter of the available memory."""
    available = available_memory()
    return 1 << 28 if available is None else min(1 << 28, max(1 << 20, available // 4 // 512 * 512))


def bytes_per_token(model: Model, depth: int) -> int:
    """Bytes that decoding one token at position `depth` reads: every weight it uses once, and the cache.

    Of a mixture of experts it uses the chosen experts. An untied embedding, of which it reads one row, is left out.
    Recurrent states count twice: they are written, too.
    """
    sizes = ((name, tensor.data.size) for name, tensor in model.weights.tensors.items())
    cache = model.new_cache(1)
    states = 0 if cache.recurrent is None else 2 * cache.recurrent.shape.nbytes
    return active_bytes(model.config, sizes) + states + depth * cache.page_bytes // PAGE
