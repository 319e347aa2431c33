"""What a model was trained for, inferred from the small files of its directory and from its name."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import Literal

from npqwen.errors import OptionError
from npqwen.format.files import open_regular

Task = Literal["text", "embedding", "reranking"]
"""To write text, to make vectors of texts, or to judge how well documents answer a query."""

POOLING = "1_Pooling/config.json"
"""Describes how sentence-transformers pools a text's hidden states into one vector."""
LOGIT_SCORE = "1_LogitScore/config.json"
"""Names the tokens from whose logits sentence-transformers computes a score."""

_OTHERWISE: dict[tuple[Task, Task], str] = {
    ("embedding", "text"): "is an embedding model, which does not write text; use embed with it (/v1/embeddings on a "
    "server), or a language model, such as Qwen/Qwen3-0.6B",
    ("reranking", "text"): "is a reranker, which judges documents and does not write text; use rerank with it "
    "(/v1/rerank on a server), or a language model, such as Qwen/Qwen3-0.6B",
    ("text", "embedding"): "is not an embedding model, as far as its files and name tell; use one, such as "
    "Qwen/Qwen3-Embedding-0.6B",
    ("reranking", "embedding"): "is a reranker, which judges documents; use rerank with it (/v1/rerank on a server), "
    "or an embedding model, such as Qwen/Qwen3-Embedding-0.6B",
    ("text", "reranking"): "is not a reranker, as far as its files and name tell; use one, such as "
    "Qwen/Qwen3-Reranker-0.6B",
    ("embedding", "reranking"): "is an embedding model, which does not judge documents; use embed with it "
    "(/v1/embeddings on a server), or a reranker, such as Qwen/Qwen3-Reranker-0.6B",
}
"""By a model's task and the requested one: what is wrong, and what to do."""
_RERANKER = re.compile(r"rerank", re.IGNORECASE)
_EMBEDDER = re.compile(r"qwen3-embedding", re.IGNORECASE)
_PIPELINE = re.compile(r"^pipeline_tag:[ \t]*[\"']?([a-z-]+)", re.MULTILINE)
_CARD_BYTES = 1 << 16
"""Bytes of a model card that are read: its metadata is at the beginning."""


def task_of(files: Container[str], name: str, pipeline: str | None) -> Task:
    """The task of a model. files: paths in its directory. name: its id or directory. pipeline: what its card says.

    Qwen3-Reranker has the files of a language model, so it is recognized by its name or its card.
    """
    last = PurePosixPath(name.replace("\\", "/")).name
    if LOGIT_SCORE in files or pipeline == "text-ranking":
        return "reranking"
    if POOLING in files or pipeline in ("feature-extraction", "sentence-similarity"):
        return "embedding"
    if _RERANKER.search(last):
        return "reranking"
    return "embedding" if _EMBEDDER.search(last) else "text"


def check_task(label: str, task: Task, wanted: Task) -> None:
    """Raise OptionError, in which the model is called `label`, unless its task is the requested one."""
    if task != wanted:
        raise OptionError(f"{label} {_OTHERWISE[task, wanted]}")


def directory_task(directory: Path, name: str | None = None) -> Task:
    """The task of the model in a directory. name: its hub id, if there is one."""
    files = {path for path in (POOLING, LOGIT_SCORE) if (directory / path).is_file()}
    return task_of(files, name or str(directory), card_pipeline(directory))


def card_pipeline(directory: Path) -> str | None:
    """The `pipeline_tag` of the model card, README.md; None without one."""
    try:
        with open_regular(directory / "README.md") as file:
            text = (file.read(_CARD_BYTES) or b"").decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return None
    if not text.startswith("---\n"):
        return None
    found = _PIPELINE.search(text[4:].partition("\n---")[0])
    return None if found is None else found[1]
