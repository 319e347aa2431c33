"""The report that `npqwen bench --report` writes: the machine, the software and the numbers, to be shared.

It has no host name, no user name and no path. The model is described by its shape.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from npqwen.errors import OutputError
from npqwen.hardware import machine
from npqwen.hardware.cgroup import memory, read
from npqwen.model import Model
from npqwen.reports import bench
from npqwen.reports.info import active_parameters, parameters
from npqwen.simd.isa import available
from npqwen.wording import size


def check_path(path: Path) -> Path:
    """`path` with ~ expanded. Raises OutputError, before anything is measured, if no report can be written there."""
    path = Path(os.path.expanduser(path))
    folder = path.parent
    if os.path.isdir(path):
        raise OutputError(f"{path} is a directory; name a file for the report")
    if not os.path.isdir(folder):
        raise OutputError(f"{folder} is not a directory; create it, or give another path for the report")
    try:
        path.stat()
    except FileNotFoundError:
        allowed = os.access(folder, os.W_OK)
    except (OSError, ValueError):  # a name that is too long, a folder without permission
        allowed = False
    else:
        allowed = os.access(path, os.W_OK)
    if not allowed:
        raise OutputError(f"{path} is not writable; give another path for the report")
    return path


def write(facts: dict[str, Any], path: Path, more: Sequence[tuple[str, str]] = ()) -> None:
    """Write JSON if the file is named .json, else `markdown(facts, more)`. Raises OutputError if that fails."""
    text = json.dumps(facts, indent=2) + "\n" if path.suffix.lower() == ".json" else markdown(facts, more)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another path for the report") from None


def collect(model: Model, speed: bench.Report, root: Path = Path("/")) -> dict[str, Any]:
    """The whole report, for JSON. root: where /proc, /sys and /etc are."""
    c = model.config
    return {
        "report": 1,
        "npqwen": speed.version,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine_facts(root) | {"read_bandwidth": [round(rate) for rate in speed.read_bandwidth]},
        "software": software_facts(root),
        "run": {
            "kernels": speed.kernels,
            "kernels_available": [isa.name for isa in available()],
            "threads": speed.threads,
            **_peak(root),
        },
        "model": {
            "type": c.model_type,
            "encoding": speed.encoding,
            "bytes": speed.weights,
            "bytes_in_huge_pages": speed.huge_pages,
            "parameters": parameters(c),
            "active_parameters": active_parameters(c),
            "layers": c.num_hidden_layers,
            "hidden": c.hidden_size,
            "feed_forward": c.intermediate_size if c.mixture is None else c.mixture.moe_intermediate_size,
            "experts": 0 if c.mixture is None else c.mixture.num_experts,
            "experts_per_token": 0 if c.mixture is None else c.mixture.num_experts_per_tok,
            "heads": [c.num_attention_heads, c.num_key_value_heads],
            "head_dim": c.head_dim,
            "vocabulary": c.vocab_size,
        },
        "measures": speed.as_dict()["measures"],
    }


def machine_facts(root: Path = Path("/")) -> dict[str, Any]:
    """Processor and memory of this machine. Sizes are in bytes, None if unknown. root: where /proc and /sys are."""
    return {
        "processor": machine.processor(root),
        "core": llvmlite.binding.get_host_cpu_name(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "memory": machine.total_memory(root),
        "memory_available": machine.available_memory(root),
        "memory_limit": memory(root),
        "page": mmap.PAGESIZE,
    }


def software_facts(root: Path = Path("/")) -> dict[str, str]:
    """The operating system, and versions of the software that compiles and runs the kernels. root: where /etc is."""
    return {
        "system": _system(root),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
    }


def markdown(facts: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> str:
    """The report of `collect` as Markdown. more: further rows (name, value) of its first table."""
    m, s, r = facts["machine"], facts["software"], facts["run"]
    rows = [
        ("machine", f"{m['processor']} ({m['core']}, {m['architecture']}), {m['processors']} processors"),
        ("kernels", f"{r['kernels']} of {', '.join(r['kernels_available'])}"),
        ("memory", _memory(m, r["threads"])),
        ("used", _used(r)),
        ("system", f"{s['system']}, kernel {s['kernel']}"),
        ("versions", f"Python {s['python']}, numba {s['numba']}, llvmlite {s['llvmlite']}, numpy {s['numpy']}"),
        ("model", _model(facts["model"])),
        *more,
    ]
    lines = [f"npqwen {facts['npqwen']} bench, {facts['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows if value]
    lines += ["", *bench.table(facts["measures"])]
    return "\n".join(lines) + "\n"


def _memory(m: dict[str, Any], threads: list[int]) -> str:
    parts = [f"reads {bench.bandwidths(threads, m['read_bandwidth'])}"]
    if m["memory"] is not None:
        parts.insert(0, size(m["memory"]))
    if m["memory_available"] is not None:
        parts.append(f"{size(m['memory_available'])} available")
    if m["memory_limit"] is not None:
        parts.append(f"{size(m['memory_limit'])} left of a container's limit")
    return ", ".join([*parts, f"pages of {m['page'] // 1024} KiB"])


def _used(r: dict[str, Any]) -> str:
    parts = []
    if r["peak"] is not None:
        parts.append(f"{size(r['peak'])} at most, mapped weights included")
    if r["own"] is not None:
        parts.append(f"{size(r['own'])} without files at the end")
    return "; ".join(parts)


def _model(m: dict[str, Any]) -> str:
    shape = f"{m['layers']} layers of {m['hidden']}, feed-forward {m['feed_forward']}"
    if m["experts"]:
        shape += f", {m['experts_per_token']} of {m['experts']} experts"
    heads = f"{m['heads'][0]} and {m['heads'][1]} heads of {m['head_dim']}, vocabulary {m['vocabulary']}"
    count = f"{m['parameters'] / 1e9:.2f}B parameters"
    huge = m["bytes_in_huge_pages"]
    pages = "" if huge is None else f" ({size(huge)} in huge pages)"
    return f"{m['type']}, {count}, {m['encoding']}, {size(m['bytes'])}{pages}: {shape}, {heads}"


def _system(root: Path) -> str:
    """The operating system: "Debian GNU/Linux 12 (bookworm)", "macOS 15.1", "Windows 11"."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(root / "etc/os-release") or "", re.M)
    if found:
        return found[1]
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _peak(root: Path) -> dict[str, int | None]:
    """Bytes: the process's peak resident memory (`peak`), and its anonymous memory now (`own`). None if unknown."""
    status = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", read(root / "proc/self/status") or "", re.M))
    peak = 1024 * int(status["VmHWM"]) if "VmHWM" in status else None
    if sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak, "own": 1024 * int(status["RssAnon"]) if "RssAnon" in status else None}
