"""What `npqwen list` prints: the models on this machine, converted and downloaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from npqwen.hub.disk_usage import bytes_of
from npqwen.hub.downloads import Download
from npqwen.hub.inventory import Conversion
from npqwen.hub.names import repository_of
from npqwen.reports.columns import ago, columns
from npqwen.wording import size


def as_dict(conversions: Sequence[Conversion], downloads: Sequence[Download]) -> dict[str, Any]:
    """The models, for JSON. Times are ISO 8601, in UTC."""
    return {
        "conversions": [
            {
                "model": one.model,
                "revisions": dict(one.revisions),
                "bits": one.bits,
                "calibrated": one.calibrated,
                "bytes": bytes_of([one.path]),
                "last_used": _iso(one.last_used),
                "stale": one.stale,
                "path": str(one.path),
            }
            for one in conversions
        ],
        "downloads": [
            {
                "model": one.model,
                "commits": list(one.commits),
                "bytes": one.bytes,
                "last_used": _iso(one.last_used),
                "use": use(one, conversions),
                "path": str(one.path),
            }
            for one in downloads
        ],
    }


def describe(conversions: Sequence[Conversion], downloads: Sequence[Download]) -> str:
    """The models, as text."""
    found = _conversions(conversions) if conversions else "no model is converted yet; npqwen pull MODEL converts one\n"
    return f"{found}\n{_downloads(downloads, conversions)}" if downloads else found


def name(one: Conversion) -> str:
    """The model of a conversion, with a revision unless it is the newest commit."""
    others = sorted(set(one.revisions) - {"main"})
    return one.model if "main" in one.revisions or not others else f"{one.model}@{others[0]}"


def bits(one: Conversion) -> str:
    """Bits per weight; "?" if they are unknown."""
    return "?" if one.bits is None else str(one.bits)


def use(download: Download, conversions: Sequence[Conversion]) -> str:
    """The use of a download: "runs in place", "converted" (so it is not needed to run), or "not converted"."""
    if download.runs_in_place:
        return "runs in place"
    usable = any(repository_of(one.model) == download.model and one.stale is None for one in conversions)
    return "converted" if usable else "not converted"


def _conversions(found: Sequence[Conversion]) -> str:
    now = time.time()
    rows = [("MODEL", "BITS", "SIZE", "LAST USED", "")]
    for one in found:
        notes = ["calibrated"] * one.calibrated + ([f"stale: {one.stale}"] if one.stale else [])
        rows.append((name(one), bits(one), size(bytes_of([one.path])), ago(one.last_used, now), "; ".join(notes)))
    hint = "\nnpqwen cache prune removes what is stale.\n" if any(one.stale for one in found) else ""
    return columns(rows) + hint


def _downloads(found: Sequence[Download], conversions: Sequence[Conversion]) -> str:
    now = time.time()
    rows = [("DOWNLOAD", "SIZE", "LAST USED", "")]
    rows += [(one.model, size(one.bytes), ago(one.last_used, now), use(one, conversions)) for one in found]
    return (
        f"{columns(rows)}\nDownloads are in huggingface_hub's cache, which other programs may share. A model that is "
        "converted runs\nwithout its download: npqwen rm --download MODEL removes it, and keeps the conversion.\n"
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
