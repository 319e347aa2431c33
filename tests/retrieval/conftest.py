"""An embedding model and a reranker in every encoding, each converted and loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from npqwen_quant import convert
from retrieval_checkpoints import embedding_checkpoint, reranker_checkpoint

import npqwen
from npqwen.model import load

CONTEXT = 512
"""Of the models, as of those that made data/retrieval.npz."""

Loaded = Callable[[int], npqwen.Model]


@pytest.fixture(scope="session")
def embedding_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_checkpoint(tmp_path_factory.mktemp("embedding") / "checkpoint")


@pytest.fixture(scope="session")
def reranker_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reranker_checkpoint(tmp_path_factory.mktemp("reranker") / "checkpoint")


@pytest.fixture(scope="session")
def embedder(embedding_source: Path) -> Iterator[Loaded]:
    with ExitStack() as opened:
        yield _loaded(embedding_source, opened)


@pytest.fixture(scope="session")
def reranker(reranker_source: Path) -> Iterator[Loaded]:
    with ExitStack() as opened:
        yield _loaded(reranker_source, opened)


def _loaded(source: Path, opened: ExitStack) -> Loaded:
    models: dict[int, npqwen.Model] = {}

    def loaded(bits: int) -> npqwen.Model:
        if bits not in models:
            path = source.with_name(f"bits-{bits}")
            convert(source, path, bits=bits)
            models[bits] = opened.enter_context(load(path, threads=2, context=CONTEXT))
        return models[bits]

    return loaded
