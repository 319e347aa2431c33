"""What `npqwen cache` prints: where the cache is, what is in it, and how large it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.hub.disk_usage import bytes_of, freed_bytes
from npqwen.hub.downloads import Download
from npqwen.hub.leftovers import Leftover
from npqwen.reports.columns import columns
from npqwen.wording import size

_PARTS = {
    "hub": "conversions of models of the hub",
    "local": "conversions of checkpoint directories",
    "kernels": "compiled kernels",
    "history": "what was entered in conversations",
    "conversations": "saved conversations",
}


@dataclass(frozen=True)
class Usage:
    """The disk space that the cache takes, in bytes."""

    path: Path
    parts: dict[str, int]
    """By the entries of the cache directory."""
    leftovers: list[Leftover]
    """What `npqwen cache prune` would remove."""
    downloads: int
    """Of Qwen3 checkpoints in huggingface_hub's cache."""
    downloaded: list[str]
    """The models of these checkpoints."""

    @classmethod
    def of(cls, root: Path, leftovers: Sequence[Leftover], downloads: Sequence[Download]) -> Usage:
        """Measure the cache directory `root`, which may not exist."""
        entries = sorted(root.iterdir()) if root.is_dir() else []
        return cls(
            path=root,
            parts={entry.name: bytes_of([entry]) for entry in entries},
            leftovers=list(leftovers),
            downloads=sum(one.bytes for one in downloads),
            downloaded=[one.model for one in downloads],
        )

    @property
    def total(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.parts.values())

    @property
    def prunable(self) -> int:
        """Bytes that `npqwen cache prune` would free."""
        return freed_bytes([one.path for one in self.leftovers])

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "path": str(self.path),
            "bytes": self.total,
            "parts": self.parts,
            "prunable": {
                "bytes": self.prunable,
                "items": [{"path": str(one.path), "reason": one.reason} for one in self.leftovers],
            },
            "downloads": {"models": self.downloaded, "bytes": self.downloads},
        }

    def describe(self) -> str:
        """The numbers, as text."""
        rows = [(f"  {name}", size(count), _PARTS.get(name, "")) for name, count in self.parts.items()]
        lines = [f"{self.path}: {size(self.total)}\n", columns(rows) if rows else ""]
        if self.leftovers:
            lines.append(f"\n{size(self.prunable)} of it will not be used again: npqwen cache prune removes that\n")
        if self.downloaded:
            lines.append(
                f"\nhuggingface_hub's cache: {size(self.downloads)} of downloads ({', '.join(self.downloaded)}); "
                "npqwen list shows them\n"
            )
        return "".join(lines)
