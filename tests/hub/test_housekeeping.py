"""What lies in the cache, what of it will not be used again, and removing it: caches built by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import small_model

from npqwen import hub
from npqwen.errors import ModelNotFoundError, OutputError
from npqwen.hub import removal
from npqwen.hub.disk_usage import bytes_of, freed_bytes
from npqwen.hub.downloads import downloaded_names, downloads
from npqwen.hub.inventory import conversions
from npqwen.hub.leftovers import Leftover, interrupted_work, leftovers, other_kernels, remove_leftover
from npqwen.hub.selection import select
from npqwen.kernels.compiled import kernel_directory, usable_directories
from npqwen.reports.cache_checks import check_cache, check_downloads

pytestmark = pytest.mark.usefixtures("cache")

MAIN = {"main": "a" * 40}


def conversion(
    cache: Path, place: str, bits: int = 4, *, model: str | None, revisions: Any = MAIN, replaced: bool = False,
    used: float | None = None,
) -> Path:  # fmt: skip
    """A converted model in the cache, with a record unless `model` is None."""
    path = small_model(cache / place, bits)
    if model is not None:
        entry = {"record_version": 1, "model": model, "revisions": revisions, "replaced": replaced}
        (path / "npqwen-source.json").write_text(json.dumps(entry))
        if used is not None:
            os.utime(path / "npqwen-source.json", (used, used))
    return path


def test_conversions_are_told_by_their_records(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    place = "hub/org--name/0123456789ab-01234567-int4-v2"
    conversion(cache, place, model="org/name", used=1000.0)
    conversion(cache, "hub/org--name/0123456789ab-01234567-int8-v2", 8, model="org/name", used=2000.0)
    conversion(cache, "local/checkpoint/0123456789ab-01234567-bf16-v2", 16, model=str(tmp_path / "checkpoint"))
    (cache / "hub/org--name/.hidden.partial-12-01234567").mkdir()
    (cache / "hub/org--name/notes.txt").write_text("no conversion")
    found = conversions(cache)
    assert [(one.model, one.bits, one.last_used, one.stale) for one in found[1:]] == [
        ("org/name", 4, 1000.0, None),
        ("org/name", 8, 2000.0, None),
    ]
    assert (found[0].model, found[0].bits, found[0].stale) == (str(tmp_path / "checkpoint"), 16, None)
    assert (found[1].path, found[1].revisions) == (cache / place, MAIN)


@pytest.mark.parametrize(
    ("place", "model", "replaced", "stale"),
    [
        ("hub/org--name/0123456789ab-01234567-int4-v2", "org/name", True, "a newer conversion has replaced it"),
        ("hub/org--name/0123456789ab-01234567-int4-v1", "org/name", False, "of format version 1; this npqwen reads"),
        ("hub/org--name/0123456789ab-01234567-int4-v99", "org/name", False, None),  # a newer npqwen's
        ("hub/org--name/0123456789ab-int4-v2", None, False, "an earlier version of npqwen made it"),
        ("hub/org--name/0123456789ab-01234567-int4-v2", None, False, None),
        ("local/gone/0123456789ab-01234567-int4-v2", "TMP/gone", False, "its checkpoint is gone"),
        ("local/gone/0123456789ab-01234567-int4-v2", "TMP/unmounted/gone", False, None),
    ],
)
def test_what_is_stale(
    place: str, model: str | None, replaced: bool, stale: str | None, cache: Path, tmp_path: Path
) -> None:
    model = model and model.replace("TMP", str(tmp_path))
    conversion(cache, place, model=model, replaced=replaced)
    (one,) = conversions(cache)
    assert (one.stale is None) == (stale is None)
    assert stale is None or (one.stale or "").startswith(stale)
    assert one.model == (model or "org/name")


def test_a_checkpoint_that_changed_leaves_a_stale_conversion(checkpoint: Path, cache: Path) -> None:
    first = hub.resolve(checkpoint)
    assert [one.stale for one in conversions(cache)] == [None]
    time.sleep(0.01)
    os.utime(checkpoint / "model.safetensors")
    second = hub.resolve(checkpoint)
    assert {one.path: one.stale is not None for one in conversions(cache)} == {first: True, second: False}
    hub.resolve(checkpoint, 8)
    assert sum(one.stale is not None for one in conversions(cache)) == 1
    assert all(map(remove_leftover, leftovers(cache)))
    assert not first.exists()
    assert second.exists()


# --- sizes ---


@pytest.mark.skipif(sys.platform == "win32", reason="needs hard links")
def test_a_file_with_two_names_counts_once_and_is_freed_with_the_last(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_bytes(b"x" * 10)
    (tmp_path / "a" / "weights").write_bytes(b"x" * 1000)
    os.link(tmp_path / "a" / "weights", tmp_path / "b" / "weights")
    (tmp_path / "large").write_bytes(b"x" * 5000)
    (tmp_path / "a" / "link").symlink_to("../large")
    link = len("../large")
    assert bytes_of([tmp_path / "a", tmp_path / "b"]) == 1020 + link
    assert bytes_of([tmp_path / "b"]) == 1010
    assert freed_bytes([tmp_path / "b"]) == 10
    assert freed_bytes([tmp_path / "a", tmp_path / "b"]) == 1020 + link
    assert bytes_of([tmp_path / "nowhere"]) == 0


# --- leftovers ---


def test_remains_of_killed_processes_are_found_and_removed(cache: Path) -> None:
    whole = conversion(cache, "hub/org--name/0123456789ab-01234567-int4-v2", model="org/name")
    parent, name = whole.parent, whole.name
    for hidden in ("partial-0123456789ab", "removed-0123456789ab", "partial-0123456789ac"):
        (parent / f".{name}.{hidden}" / "output").mkdir(parents=True)
        (parent / f".{name}.{hidden}" / "output" / "model.safetensors").write_bytes(b"x" * 50)
    (parent / f".{name}.partial-0123456789ab" / "lock").touch()
    found = interrupted_work(cache)
    assert sorted(one.path.name.removeprefix(f".{name}.") for one in found) == [
        "partial-0123456789ab", "partial-0123456789ac", "removed-0123456789ab"
    ]  # fmt: skip
    assert all(one.reason for one in found)
    assert all(map(remove_leftover, found))
    assert [path.name for path in parent.iterdir()] == [name]


def test_a_model_that_was_moved_aside_and_has_no_successor_is_kept(cache: Path) -> None:
    name = "0123456789ab-01234567-int4-v2"
    conversion(cache, f"hub/org--name/.{name}.partial-0123456789ab/old", model="org/name")
    assert interrupted_work(cache) == []
    assert conversions(cache) == []
    conversion(cache, f"hub/org--name/{name}", model="org/name")
    assert len(interrupted_work(cache)) == 1


HOLDING = """
import sys
from npqwen.file_lock import try_lock
files = [open(name, "wb") for name in sys.argv[1:]]
assert all(map(try_lock, files))
print("held", flush=True)
sys.stdin.read()
"""


def test_work_of_living_processes_is_left_alone(cache: Path) -> None:
    parent = cache / "local" / "m"
    works = [parent / f".0123456789ab-01234567-int4-v2.partial-0123456789a{n}" for n in "bc"]
    for directory in works:
        directory.mkdir(parents=True)
    locks = [str(work / "lock") for work in works]
    command = [sys.executable, "-c", HOLDING, *locks]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert interrupted_work(cache) == []
        assert not remove_leftover(Leftover(works[0], "", Path(locks[0])))
        assert works[0].exists()
        process.communicate("")
    assert len(interrupted_work(cache)) == 2


def test_kernels_of_other_versions_and_machines(cache: Path) -> None:
    ours = {path.name for path in usable_directories()}
    assert kernel_directory().name in ours
    for name in (*ours, "avx2-0123456789abcdef0123", ".avx2-0123456789abcdef0124.removed-0123456789ab"):
        (cache / "kernels" / name).mkdir(parents=True)
    found = other_kernels(cache)
    assert {one.path.name for one in found} == {path.name for path in (cache / "kernels").iterdir()} - ours
    assert all(map(remove_leftover, found))
    assert {path.name for path in (cache / "kernels").iterdir()} == ours


def test_a_conversion_that_comes_into_use_meanwhile_is_kept(cache: Path) -> None:
    place = "hub/org--name/0123456789ab-01234567-int4-v2"
    path = conversion(cache, place, model="org/name", replaced=True)
    (found,) = leftovers(cache)
    conversion_record = json.loads((path / "npqwen-source.json").read_text())
    (path / "npqwen-source.json").write_text(json.dumps(conversion_record | {"replaced": False}))
    assert not remove_leftover(found)
    assert path.exists()


def test_what_belongs_to_another_user_is_left_out(
    cache: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.convert(checkpoint)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/snapshots")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refuse)
        assert interrupted_work(cache) == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", refuse)
    assert downloads() == []
    found = [finding.text for finding in check_downloads([])]
    assert found == ["downloads cannot be read: /somewhere/snapshots: Permission denied"]
    assert not [finding for finding in check_cache(cache) if "cannot be read" in finding.text]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).parent.name != "local")
    found = [finding.text for finding in check_cache(cache) if "cannot be read" in finding.text]
    assert found == [f"{cache / 'local' / checkpoint.name} cannot be read"]


def test_an_empty_cache_and_none(cache: Path) -> None:
    assert (conversions(cache), leftovers(cache)) == ([], [])
    cache.mkdir()
    assert (conversions(cache), leftovers(cache)) == ([], [])


# --- removal ---

KILLED = """
import os, signal, sys
from pathlib import Path
unlink, done = os.unlink, []
def deadly(*args, **options):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(unlink(*args, **options))
os.unlink = deadly
from npqwen.hub.removal import remove
remove(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_removal_that_is_killed_leaves_nothing_that_loads(cache: Path, checkpoint: Path) -> None:
    path = hub.resolve(checkpoint)
    files = len([*path.rglob("*")])
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert conversions(cache) == []
    (rest,) = path.parent.iterdir()
    assert 0 < len([*rest.rglob("*")]) < files
    (found,) = leftovers(cache)
    assert (found.path, found.reason) == (rest, "my model: an interrupted removal")
    assert hub.resolve(checkpoint) == path  # converted again, whole
    assert len([*path.rglob("*")]) == files
    assert [*path.parent.iterdir()] == [path]
    assert remove_leftover(found)  # too late, which is no error


RUNNING = """
import sys, npqwen
with npqwen.load(sys.argv[1], threads=1) as model:
    print("loaded", flush=True)
    sys.stdin.readline()
    print(model.chat("What is 17 + 25?", temperature=0, thinking=False).text, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="refuses to remove mapped files")
def test_a_model_in_use_survives_its_removal(tiny: Callable[[int], Path], tmp_path: Path, kernels: Path) -> None:
    """Also a chat that begins only afterwards: weights are mapped, tokenizer and chat template read."""
    import shutil

    path = tmp_path / "model"
    shutil.copytree(tiny(4), path)
    environment = os.environ | {"NPQWEN_CACHE": str(kernels.parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNING, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        removal.remove(path)
        assert not path.exists()
        out, _ = process.communicate("go\n", timeout=300)
    assert (process.returncode, out) == (0, "17 + 25 = 42\n")


def test_what_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Access is denied")

    (tmp_path / "model").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OutputError, match=r"Access is denied.*end the programs that run"):
            removal.remove(tmp_path / "model")
    removal.remove(tmp_path / "model")
    removal.remove(tmp_path / "model")  # gone already
    assert not (tmp_path / "model").exists()


# --- names ---


def test_models_by_the_names_that_people_type(cache: Path, tmp_path: Path) -> None:
    four = conversion(cache, "hub/Qwen--Qwen3-0.6B/0123456789ab-01234567-int4-v2", model="Qwen/Qwen3-0.6B")
    pinned = {"v1": "b" * 40}
    old = conversion(
        cache, "hub/Qwen--Qwen3-0.6B/0123456789ac-01234567-int4-v2", model="Qwen/Qwen3-0.6B", revisions=pinned
    )
    other = conversion(cache, "hub/org--Tuned/0123456789ab-01234567-int4-v2", model="org/Tuned")
    gone = str(tmp_path / "gone")
    local = conversion(cache, "local/gone/0123456789ab-01234567-int4-v2", model=gone, revisions={})
    found = conversions(cache)

    def chosen(name: str) -> set[Path]:
        return {one.path for one in select(name, found, [])[0]}

    for name in ("Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b", "Qwen3-0.6B", "https://huggingface.co/Qwen/Qwen3-0.6B"):
        assert chosen(name) == {four, old}
    assert chosen("Qwen/Qwen3-0.6B@v1") == chosen("Qwen3-0.6B@bbbbbbbb") == {old}
    assert chosen("Qwen/Qwen3-0.6B@main") == {four}
    assert chosen("tuned") == chosen("org/tuned") == {other}
    assert chosen(gone) == chosen(str(local)) == {local}
    for name, instead in {
        "Qwen/Qwen3-0.6": "did you mean Qwen/Qwen3-0.6B?",
        "Qwen/Qwen3-0.8B": "did you mean Qwen/Qwen3-0.6B?",
        "tund": "did you mean org/Tuned?",
        "other/Tuned": "did you mean org/Tuned?",
        "Qwen/Qwen3-0.6B@v2": "did you mean Qwen/Qwen3-0.6B?",
        "zzz": "see npqwen list",
    }.items():
        with pytest.raises(ModelNotFoundError, match="is in the cache; ") as error:
            chosen(name)
        assert str(error.value).endswith(instead), name


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"model_type": "qwen3"}, True),
        ({"model_type": "qwen3_next"}, True),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, True),
        ({"model_type": "qwen3_vl_moe", "text_config": {}}, True),
        ({"model_type": "llama"}, False),
    ],
)
def test_downloads_are_those_that_can_be_converted(
    config: dict[str, Any], ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert downloaded_names() == (["org/name"] if ours else [])
    assert [download.model for download in downloads()] == downloaded_names()
