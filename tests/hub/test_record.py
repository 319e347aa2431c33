"""What the cache knows of its conversions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from npqwen import hub
from npqwen.hub import record
from npqwen.hub.record import NAME, Record

pytestmark = pytest.mark.usefixtures("cache")


def test_the_last_use(checkpoint: Path) -> None:
    place = hub.resolve(checkpoint)
    os.utime(place / NAME, (1000, 1000))
    assert record.last_used(place) == 1000
    assert hub.resolve(checkpoint) == place
    assert record.last_used(place) > 1000
    (place / NAME).unlink()
    assert record.last_used(place) == place.stat().st_mtime


def test_a_changed_checkpoint_replaces_conversions_of_as_many_bits(checkpoint: Path, tmp_path: Path) -> None:
    four, eight = hub.resolve(checkpoint), hub.resolve(checkpoint, 8)
    model = str(checkpoint.resolve())
    assert record.read(four) == record.read(eight) == Record(model)
    os.utime(four / NAME, (1000, 1000))
    write_checkpoint(checkpoint, dtype="F32", tokenizer=True)
    new = hub.resolve(checkpoint)
    assert record.read(four) == Record(model, replaced=True)
    assert record.last_used(four) == 1000
    assert record.read(eight) == record.read(new) == Record(model)
    assert list(record.conversions(tmp_path / "cache")) == sorted([four, eight, new])


def test_directories_of_the_same_name_do_not_replace_each_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a" / "m", tokenizer=True)
    write_checkpoint(tmp_path / "b" / "m", tokenizer=True)
    first, second = hub.resolve(tmp_path / "a" / "m"), hub.resolve(tmp_path / "b" / "m")
    assert first.parent == second.parent
    assert record.read(first) == Record(str((tmp_path / "a" / "m").resolve()))


def test_a_conversion_that_is_current_again(checkpoint: Path) -> None:
    generation = checkpoint / "generation_config.json"
    before, times = generation.read_bytes(), generation.stat()
    first = hub.resolve(checkpoint)
    generation.write_text("{}")
    second = hub.resolve(checkpoint)
    generation.write_bytes(before)
    os.utime(generation, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hub.resolve(checkpoint) == first
    assert record.read(first) == Record(str(checkpoint.resolve()))
    assert record.read(second) == Record(str(checkpoint.resolve()), replaced=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"record_version": 2}', '{"record_version": 1, "model": 3}', b"\xff", "null"]
)
def test_damaged_records_are_written_again(checkpoint: Path, text: str | bytes) -> None:
    place = hub.resolve(checkpoint)
    (place / NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert record.read(place) is None
    assert hub.resolve(checkpoint) == place
    assert record.read(place) == Record(str(checkpoint.resolve()))


def test_revisions_of_the_wrong_kind_are_damage(checkpoint: Path) -> None:
    place = hub.resolve(checkpoint)
    raw = json.loads((place / NAME).read_text())
    wrong: list[object] = [[], {"main": 3}, None]
    for revisions in wrong:
        (place / NAME).write_text(json.dumps(raw | {"revisions": revisions}))
        assert record.read(place) is None


def test_a_cache_that_cannot_be_written_is_used_all_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = hub.resolve(checkpoint)
    (place / NAME).unlink()

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert hub.resolve(checkpoint) == place
    assert sorted(path.name for path in place.iterdir() if NAME in path.name) == []
