"""A benchmark's report for others: the machine, how hot it ran, and the numbers, with nothing private in it.

No name of the machine, its user or a file: a model is told by its shape.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import sys
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
from npqwen.hardware.sensors import Sensors, read_sensors, throttling, vcgencmd
from npqwen.model import Model
from npqwen.reports import bench
from npqwen.reports.info import active_parameters, parameters, size
from npqwen.simd.isa import available


class Log:
    """The sensors before, during and after the runs."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: where /proc and /sys are."""
        self.root = root
        self.readings = [read_sensors(root, vcgencmd)]

    def add(self) -> None:
        """Between two runs."""
        self.readings.append(read_sensors(self.root))

    def end(self) -> None:
        """After the last one."""
        self.readings.append(read_sensors(self.root, vcgencmd))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: degrees Celsius, MHz; None for what the system does not tell."""
        before, after = self.readings[0], self.readings[-1]
        slowdowns = None
        if before.slowdowns is not None and after.slowdowns is not None:
            slowdowns = after.slowdowns - before.slowdowns
        return {
            "temperatures": {
                name: {
                    "before": degrees,
                    "highest": max(r.temperatures.get(name, degrees) for r in self.readings),
                    "after": after.temperatures.get(name),
                }
                for name, degrees in before.temperatures.items()
            },
            "clocks": {
                "allowed": max(before.fastest, default=None),
                "before": _range(before),
                "lowest": min((min(r.clocks) for r in self.readings if r.clocks), default=None),
                "after": _range(after),
                "governor": before.governor,
            },
            "throttled": {
                "before": None if before.throttled is None else hex(before.throttled),
                "after": None if after.throttled is None else hex(after.throttled),
                "slowdowns": slowdowns,
            },
        }


def check_place(path: Path) -> Path:
    """`path`, a leading ~ replaced; OutputError now, not after minutes, if a report cannot be written there."""
    path = Path(os.path.expanduser(path))
    folder = path.parent
    if os.path.isdir(path):
        raise OutputError(f"{path} is a directory; name a file for the report")
    if not os.path.isdir(folder):
        raise OutputError(f"{folder} is not there to write a report to; make it, or name another place")
    try:
        path.stat()
    except FileNotFoundError:
        allowed = os.access(folder, os.W_OK)
    except (OSError, ValueError):  # a name too long, a folder that is closed to us
        allowed = False
    else:
        allowed = os.access(path, os.W_OK)
    if not allowed:
        raise OutputError(f"{path} cannot be written to; name another place for the report")
    return path


def write(facts: dict[str, Any], path: Path) -> None:
    """JSON into a file named .json, else Markdown; OutputError if that fails."""
    text = json.dumps(facts, indent=2) + "\n" if path.suffix.lower() == ".json" else markdown(facts)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; name another place for the report") from None


def collect(model: Model, speed: bench.Report, log: Log, root: Path = Path("/")) -> dict[str, Any]:
    """All of the report, for JSON.  root: where /proc, /sys and /etc are."""
    c = model.config
    return {
        "report": 1,
        "npqwen": speed.version,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {
            "processor": machine.processor(root),
            "core": llvmlite.binding.get_host_cpu_name(),
            "architecture": platform.machine(),
            "processors": os.cpu_count(),
            "memory": machine.total_memory(root),
            "memory_available": machine.available_memory(root),
            "memory_limit": memory(root),
            "page": mmap.PAGESIZE,
            "read_bandwidth": round(speed.read_bandwidth),
        },
        "software": {
            "system": _system(root),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
            "numpy": np.__version__,
        },
        "run": {
            "kernels": speed.kernels,
            "kernels_available": [isa.name for isa in available()],
            "threads": speed.threads,
            **_peak(root),
        },
        "model": {
            "type": c.model_type,
            "bits": speed.bits,
            "bytes": speed.weights,
            "bytes_in_large_pages": speed.large_pages,
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
        "sensors": log.as_dict(),
        "measures": speed.as_dict()["measures"],
    }


def markdown(facts: dict[str, Any]) -> str:
    """The same to be read, and pasted into an issue."""
    m, s, r = facts["machine"], facts["software"], facts["run"]
    rows = [
        ("machine", f"{m['processor']} ({m['core']}, {m['architecture']}), {m['processors']} processors"),
        ("kernels", f"{r['kernels']} of {', '.join(r['kernels_available'])}; {r['threads']} threads"),
        ("memory", _memory(m)),
        ("used", _used(r)),
        ("system", f"{s['system']}, kernel {s['kernel']}"),
        ("versions", f"Python {s['python']}, numba {s['numba']}, llvmlite {s['llvmlite']}, numpy {s['numpy']}"),
        ("model", _model(facts["model"])),
        *_sensors(facts["sensors"]),
    ]
    lines = [f"npqwen {facts['npqwen']} bench, {facts['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows if value]
    lines += ["", *bench.table(facts["measures"])]
    return "\n".join(lines) + "\n"


def _memory(m: dict[str, Any]) -> str:
    said = [f"reads {m['read_bandwidth'] / 1e9:.1f} GB/s"]
    if m["memory"] is not None:
        said.insert(0, size(m["memory"]))
    if m["memory_available"] is not None:
        said.append(f"{size(m['memory_available'])} available")
    if m["memory_limit"] is not None:
        said.append(f"a container's limit leaves {size(m['memory_limit'])}")
    return ", ".join([*said, f"pages of {m['page'] // 1024} KiB"])


def _used(r: dict[str, Any]) -> str:
    said = []
    if r["peak"] is not None:
        said.append(f"{size(r['peak'])} at most, mapped weights counted")
    if r["own"] is not None:
        said.append(f"{size(r['own'])} besides files at the end")
    return "; ".join(said)


def _model(m: dict[str, Any]) -> str:
    shape = f"{m['layers']} layers of {m['hidden']}, feed-forward {m['feed_forward']}"
    if m["experts"]:
        shape += f", {m['experts_per_token']} of {m['experts']} experts"
    heads = f"{m['heads'][0]} and {m['heads'][1]} heads of {m['head_dim']}, vocabulary {m['vocabulary']}"
    encoding = f"int{m['bits']}" if m["bits"] < 16 else "bf16"
    count = f"{m['parameters'] / 1e9:.2f}B parameters"
    large = m["bytes_in_large_pages"]
    pages = "" if large is None else f" ({size(large)} in large pages)"
    return f"{m['type']}, {count}, {encoding}, {size(m['bytes'])}{pages}: {shape}, {heads}"


def _sensors(s: dict[str, Any]) -> list[tuple[str, str]]:
    hottest = sorted(s["temperatures"].items(), key=lambda item: -item[1]["highest"])[:4]
    temperatures = [f"{name} {t['before']:.0f} before, {t['highest']:.0f} at most" for name, t in hottest]
    clocks, throttled = s["clocks"], s["throttled"]
    clock = ""
    if clocks["lowest"] is not None:
        clock = f"{clocks['after']} MHz after, {clocks['lowest']} at least"
        clock += f", {clocks['allowed']} allowed" if clocks["allowed"] is not None else ""
        clock += f", governor {clocks['governor']}" if clocks["governor"] else ""
    said = []
    if throttled["after"] is not None:
        before = f" (before: {throttled['before']})" if throttled["before"] != throttled["after"] else ""
        said.append(f"{throttled['after']}: {throttling(int(throttled['after'], 16))}{before}")
    if throttled["slowdowns"] is not None:
        said.append(f"{throttled['slowdowns']} times during the runs")
    return [
        ("temperature, °C", "; ".join(temperatures) or "not told"),
        ("clock", clock or "not told"),
        ("throttled", "; ".join(said) or "not told"),
    ]


def _range(sensors: Sensors) -> str | None:
    if not sensors.clocks:
        return None
    low, high = min(sensors.clocks), max(sensors.clocks)
    return str(low) if low == high else f"{low}-{high}"


def _system(root: Path) -> str:
    """`Debian GNU/Linux 12 (bookworm)`, `macOS 15.1`, `Windows 11`."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(root / "etc/os-release") or "", re.M)
    if found:
        return found[1]
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _peak(root: Path) -> dict[str, int | None]:
    """Bytes of memory this process had at most (`peak`), and has now besides pages of files (`own`)."""
    status = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", read(root / "proc/self/status") or "", re.M))
    peak = 1024 * int(status["VmHWM"]) if "VmHWM" in status else None
    if sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak, "own": 1024 * int(status["RssAnon"]) if "RssAnon" in status else None}
