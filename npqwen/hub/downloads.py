"""Qwen3 checkpoints in huggingface_hub's cache. Other programs share it, so only its own functions change it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npqwen.errors import CheckpointError, OutputError
from npqwen.format.config import MODEL_TYPES, read_json
from npqwen.format.quantization import is_converted
from npqwen.format.text_part import text_part

_FOLDER = "models--"
"""The prefix of the names of huggingface_hub's directories of models; "owner--name" follows."""


@dataclass(frozen=True)
class Download:
    """All revisions of one repository that were downloaded."""

    model: str
    """The hub id."""
    path: Path
    commits: tuple[str, ...]
    bytes: int
    last_used: float
    """Seconds since the epoch."""
    runs_in_place: bool
    """Whether it is a converted model, which runs from there."""


def downloads() -> list[Download]:
    """The downloaded checkpoints of supported families, and converted models, by name.

    Empty if huggingface_hub cannot read its cache, for example because part of it belongs to another user:
    `damaged_downloads` says why.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.utils import CacheNotFound  # type: ignore[attr-defined]

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return []
    chosen = []
    for repository in found:
        snapshots = [revision.snapshot_path for revision in repository.revisions]
        if repository.repo_type == "model" and any(map(_is_ours, snapshots)):
            chosen.append(
                Download(
                    repository.repo_id,
                    repository.repo_path,
                    tuple(sorted(revision.commit_hash for revision in repository.revisions)),
                    repository.size_on_disk,
                    repository.last_accessed,
                    any(map(is_converted, snapshots)),
                )
            )
    return sorted(chosen, key=lambda download: download.model.lower())


def damaged_downloads() -> list[str]:
    """huggingface_hub's warnings about repositories in its cache, a sentence each. OSError if it cannot read it."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.utils import CacheNotFound  # type: ignore[attr-defined]

    try:
        return [str(warning) for warning in scan_cache_dir(constants.HF_HUB_CACHE).warnings]
    except CacheNotFound:
        return []


def downloaded_names() -> list[str]:
    """The hub ids of `downloads()`, in no order. Fast, as no sizes are measured."""
    from huggingface_hub import constants

    return [
        path.name.removeprefix(_FOLDER).replace("--", "/", 1)
        for path in Path(constants.HF_HUB_CACHE).glob(f"{_FOLDER}*")
        if any(map(_is_ours, path.glob("snapshots/*")))
    ]


def remove_download(download: Download) -> None:
    """Remove all of its revisions. Raises OutputError if they are still there afterwards."""
    from huggingface_hub import constants, scan_cache_dir

    scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*download.commits).execute()
    if any(left.model == download.model for left in downloads()):
        raise OutputError(f"{download.path} cannot be removed entirely; check who owns it, and whether it is in use")


def _is_ours(snapshot: Path) -> bool:
    try:
        raw = read_json(snapshot / "config.json")
        return (text_part(raw) or raw).get("model_type") in MODEL_TYPES
    except CheckpointError:
        return _has_gguf(snapshot)


def _has_gguf(snapshot: Path) -> bool:
    """Whether it has a GGUF file of a supported family."""
    found = next(snapshot.rglob("*.gguf"), None)
    if found is None:
        return False
    from npqwen_quant.gguf_config import ARCHITECTURES
    from npqwen_quant.gguf_header import read_architecture

    return read_architecture(found) in ARCHITECTURES
