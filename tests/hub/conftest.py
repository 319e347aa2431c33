"""A cache of the test's own, a checkpoint, and a hub on this machine that the real client uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import npqwen_quant
import pytest
from checkpoints import write_checkpoint
from fake_hub import FakeHub
from huggingface_hub import constants


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("NPQWEN_CACHE", str(place))
    return place


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "my model"
    write_checkpoint(directory, tokenizer=True)
    return directory


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The output directories of all conversions."""
    places: list[Path] = []

    def count(name: str) -> None:
        convert = getattr(npqwen_quant, name)

        def counted(source: Path, out: Path, *args: Any, **options: Any) -> None:
            places.append(out)
            convert(source, out, *args, **options)

        monkeypatch.setattr(npqwen_quant, name, counted)

    count("convert")
    count("convert_shards")
    return places


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that huggingface_hub uses in this process, with a cache of the test's own."""
    server = FakeHub()
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


class Connection:
    """What stands between this machine and the hub."""

    error: Exception | None = None
    """Raised by every query."""


@pytest.fixture
def connection(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Connection:
    state = Connection()
    model_info = huggingface_hub.HfApi.model_info

    def query(*args: Any, **options: Any) -> Any:
        if state.error is not None:
            raise state.error
        return model_info(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", query)
    return state
