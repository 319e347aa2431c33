"""What `npqwen doctor` prints: this machine, which models run on it and how fast, and what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen import __version__
from npqwen.cache_directory import cache_directory
from npqwen.hardware import cgroup, machine
from npqwen.hardware.contention import Contention
from npqwen.hub.disk_space import free_bytes
from npqwen.hub.disk_usage import bytes_of
from npqwen.hub.downloads import Download, downloads
from npqwen.hub.inventory import conversions
from npqwen.reports.bandwidth import ReadBandwidth
from npqwen.reports.bench import bytes_to_read
from npqwen.reports.cache_checks import check_cache, check_downloads
from npqwen.reports.extras import Extra, extras
from npqwen.reports.finding import Finding
from npqwen.reports.forecast import CONTEXT, SHARE, Forecast, forecasts, table
from npqwen.reports.machine_report import machine_facts, software_facts
from npqwen.simd.instructions import InstructionSet
from npqwen.simd.isa import ISA, available
from npqwen.wording import counted, size

_PORTABLE = InstructionSet.name
_PASSES = 20
"""Measurements of the bandwidth. The best one counts: other programs slow some of them."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found. Sizes are in bytes, None where the system does not tell."""

    machine: dict[str, Any]
    """As in the report of `npqwen bench`, with `swap`, `swap_used`, `quota` (CPUs) and `read_bandwidth` (bytes/s)."""
    software: dict[str, str]
    threads: int
    cpus: int
    """CPUs that this process may use."""
    kernels: str
    kernels_available: list[str]
    cache: dict[str, Any]
    extras: list[Extra]
    models: list[Forecast]
    findings: list[Finding]

    @property
    def is_well(self) -> bool:
        """Whether none of the findings is a problem."""
        return not any(one.is_problem for one in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "doctor": 1,
            "npqwen": __version__,
            "well": self.is_well,
            "findings": [one.as_dict() for one in self.findings],
            "machine": self.machine,
            "software": self.software,
            "run": {
                "threads": self.threads,
                "cpus": self.cpus,
                "kernels": self.kernels,
                "kernels_available": self.kernels_available,
            },
            "cache": self.cache,
            "extras": [one.as_dict() for one in self.extras],
            "models": [one.as_dict() for one in self.models],
        }

    def describe(self) -> str:
        """Everything, as text."""
        m, s = self.machine, self.software
        offers, threads = ", ".join(self.kernels_available), counted(self.threads, "thread")
        quota = "" if m["quota"] is None else f", quota of {m['quota']:g} CPUs"
        lines = [
            ("npqwen", f"{__version__}, {Path(__file__).parents[1]}"),
            ("machine", f"{m['processor']} ({m['core']}, {m['architecture']}), {self.cpus} CPUs{quota}"),
            ("kernels", f"{self.kernels} (this processor offers {offers}), {threads}"),
            ("memory", _memory(m)),
            ("bandwidth", f"{m['read_bandwidth'] / 1e9:.1f} GB/s read, the best of {_PASSES} passes with {threads}"),
            ("cache", _cache(self.cache)),
            ("system", f"{s['system']}, kernel {s['kernel']}"),
            ("versions", f"Python {s['python']}, NumPy {s['numpy']}, Numba {s['numba']}, llvmlite {s['llvmlite']}"),
            *((("extras", "")[i > 0], one.describe()) for i, one in enumerate(self.extras)),
        ]
        text = "".join(f"{name:11}{value}\n" for name, value in lines)
        return f"{text}\n{_models(self.models)}\n{self._findings()}"

    def _findings(self) -> str:
        problems = [one for one in self.findings if one.is_problem]
        notes = [one for one in self.findings if not one.is_problem]
        text = f"{counted(len(problems), 'problem')}:\n" if problems else "No problems.\n"
        text += "".join(f"* {one.describe()}" for one in problems)
        return text + ("\nGood to know:\n" + "".join(f"* {one.describe()}" for one in notes) if notes else "")


def examine(root: Path = Path("/")) -> Diagnosis:
    """Examine this machine and the caches, and measure the memory bandwidth, which takes a second or two. Nothing is
    changed, except that a missing kernel is compiled. root: where /proc, /sys and /etc are.
    """
    threads, cpus = machine.default_threads(root), machine.usable_cpus(root)
    contention = Contention(root)
    with ReadBandwidth(threads, bytes_to_read()) as memory:
        bandwidth = max(memory.measure(1) for _ in range(_PASSES))
    busy = contention.hint(threads)
    swap = machine.swap_memory(root)
    facts = machine_facts(root) | {
        "swap": None if swap is None else swap[0],
        "swap_used": None if swap is None else swap[1],
        "quota": cgroup.processors(root),
        "read_bandwidth": round(bandwidth),
    }
    place, fetched, optional = cache_directory(), downloads(), extras()
    limits = None if ISA.name == _PORTABLE else bandwidth
    findings = [
        *_check_machine(facts, busy),
        *_check_kernels(),
        *check_cache(place),
        *check_downloads(fetched),
        *_check_extras(optional),
    ]
    return Diagnosis(
        machine=facts,
        software=software_facts(root),
        threads=threads,
        cpus=cpus,
        kernels=ISA.name,
        kernels_available=[isa.name for isa in available()],
        cache=_usage(place, fetched),
        extras=optional,
        models=list(forecasts(facts["memory_available"], limits, threads)),
        findings=findings,
    )


def _usage(place: Path, fetched: list[Download]) -> dict[str, Any]:
    found = conversions(place)
    return {
        "path": str(place),
        "conversions": len(found),
        "conversion_bytes": bytes_of([one.path for one in found]),
        "kernel_bytes": bytes_of([place / "kernels"]) if (place / "kernels").is_dir() else 0,
        "downloads": len(fetched),
        "download_bytes": sum(one.bytes for one in fetched),
        "free": free_bytes(place),
    }


def _check_machine(facts: dict[str, Any], busy: str | None) -> Iterator[Finding]:
    memory, swap, used = facts["memory_available"], facts["swap"], facts["swap_used"]
    if memory is not None and memory < 1 << 30:
        yield Finding(
            f"only {size(memory)} of memory is available, too little for Qwen3-0.6B at --bits 4",
            "close other programs, or raise the limit of this container or unit",
        )
    if swap and 2 * used > swap:
        yield Finding.note(
            f"{size(used)} of {size(swap)} of swap space is in use: this machine is short of memory",
            "close other programs; weights that are mapped from files need no swap space",
        )
    if busy is not None:
        yield Finding.note(
            f"{busy}; the bandwidth above is what they leave", "run npqwen doctor again when they are done"
        )
    limit = _address_space()
    if limit is not None and limit < 64 << 30:
        yield Finding(
            f"the address space is limited to {size(limit)}, and the weights have to be mapped into it",
            "ulimit -v unlimited, or limit the memory by a control group (systemd's MemoryMax) instead",
        )


def _address_space() -> int | None:
    """The limit of this process's address space in bytes, None if there is none."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _check_kernels() -> Iterator[Finding]:
    best = available()[0].name
    if best == _PORTABLE:
        yield Finding.note(
            "there are no kernels for this processor: portable ones run instead, several times slower",
            "use a small model with --bits 8, which is the fastest here; npqwen bench MODEL measures it",
        )
    elif best != ISA.name:
        yield Finding.note(f"NPQWEN_ISA={os.environ.get('NPQWEN_ISA')} replaces {best}, the best kernels", "unset it")


def _check_extras(found: list[Extra]) -> Iterator[Finding]:
    for extra in found:
        for name, reason in extra.broken.items():
            again = f"pip install --force-reinstall {name}"
            yield Finding(f"{name} is installed, but cannot be imported ({reason})", again)


def _memory(m: dict[str, Any]) -> str:
    parts = []
    if m["memory"] is not None:
        parts.append(size(m["memory"]))
    if m["memory_available"] is not None:
        parts.append(f"{size(m['memory_available'])} available")
    if m["memory_limit"] is not None:
        parts.append(f"{size(m['memory_limit'])} left of a control group's limit")
    if m["swap"] is not None:
        parts.append(f"{size(m['swap_used'])} of {size(m['swap'])} swap in use" if m["swap"] else "no swap")
    return ", ".join(parts) or "unknown"


def _cache(c: dict[str, Any]) -> str:
    kept = f"{counted(c['conversions'], 'conversion')}, {size(c['conversion_bytes'])}"
    fetched = f"; {counted(c['downloads'], 'download')}, {size(c['download_bytes'])}" if c["downloads"] else ""
    return f"{c['path']}: {kept}; kernels, {size(c['kernel_bytes'])}{fetched}; {size(c['free'])} free"


def _models(found: list[Forecast]) -> str:
    speed = f"decoding at {SHARE:.0%} of the bandwidth" if any(one.tokens_per_second for one in found) else ""
    how = f", and tokens/s, estimated:\n{speed}; npqwen bench MODEL measures it" if speed else ""
    return f"{table(found)}\nMemory for {CONTEXT:,} tokens of context{how}.\n"
