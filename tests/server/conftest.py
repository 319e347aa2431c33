"""What tests of the server share: the example model behind all APIs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Runs, served, watched_runs

import npqwen
from npqwen.server import app


@pytest.fixture(scope="session")
def tiny_model(tiny: Callable[[int], Path]) -> Iterator[npqwen.Model]:
    """The example model with 16 bits, the one that the server has: what it computes is the oracle."""
    with npqwen.load(tiny(16), threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def server(tiny_model: npqwen.Model) -> Iterator[str]:
    """The address of a server with the example model."""
    with served(app(tiny_model)) as url:
        yield url


@pytest.fixture
def runs() -> Iterator[Runs]:
    """The runs that the test's requests start."""
    with watched_runs() as seen:
        yield seen
