"""`npqwen list`, `rm`, `pull` and `cache`: what they print, ask, refuse and remove."""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Connection, FakeHub
from npqwen_quant import convert

from npqwen.commands import cli
from npqwen.reports.columns import ago, columns

pytestmark = pytest.mark.usefixtures("cache")

Run = Callable[..., tuple[Any, str, str]]
ID = "org/name"


@pytest.fixture
def run(fake_hub: FakeHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line: status, stdout, stderr; with a hub that has org/name."""
    fake_hub.publish(ID, checkpoint)

    def command(*args: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(arg) for arg in args])
        return exit.value.code, *capsys.readouterr()

    return command


def rows(text: str) -> list[list[str]]:
    """The cells of a table, which two blanks or more separate."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_info_downloads_a_converted_model_but_no_checkpoint(
    run: Run, fake_hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    status, out, err = run("info", ID)
    assert (status, err) == (0, f"{ID} is not converted yet; this is what a conversion will give and need\n")
    assert out.startswith(f"model           {ID}")
    assert "model.safetensors" not in fake_hub.downloads
    convert(checkpoint, tmp_path / "ready", bits=8)
    fake_hub.publish("org/ready", tmp_path / "ready")
    status, out, _ = run("info", "org/ready", "--json")
    assert (status, json.loads(out)["bits"]) == (0, 8)


def test_info_says_once_that_the_hub_is_out_of_reach(run: Run, connection: Connection) -> None:
    run("pull", ID, "--bits", "8")
    connection.error = OSError("no route to host")
    status, _, err = run("info", ID, "--bits", "4")
    assert status == 0
    assert err.splitlines() == [
        "the hub cannot be reached (no route to host); using the copy downloaded before",
        f"{ID} is not converted yet; this is what a conversion will give and need",
    ]


def test_pull_downloads_converts_and_writes_the_path(run: Run, fake_hub: FakeHub, cache: Path) -> None:
    status, out, err = run("pull", ID, "--bits", "8")
    place = Path(out.strip())
    assert status == 0
    assert place.is_relative_to(cache)
    assert json.loads((place / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert "converting" in err
    fetched = len(fake_hub.downloads)
    assert run("pull", ID, "--bits", "8", "-q") == (0, f"{place}\n", "")
    assert len(fake_hub.downloads) == fetched
    hint = f"is not needed to run the model; npqwen rm --download {ID} removes it"
    assert hint in err
    assert hint not in run("pull", ID, "--low-disk")[2]  # of which only small files are left


def test_list_for_people_and_for_programs(run: Run, checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    assert run("list") == (0, "no model is converted yet; npqwen pull MODEL converts one\n", "")
    place = Path(run("pull", ID)[1].strip())
    run("pull", checkpoint, "--bits", "8")
    hours = time.time() - 3 * 3600 - 5
    os.utime(place / "npqwen-source.json", (hours, hours))
    status, out, err = run("list")
    assert (status, err) == (0, "")
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    table = rows(out)
    assert table[0] == ["MODEL", "BITS", "SIZE", "LAST USED"]
    assert table[1][:2] == [str(checkpoint), "8"]
    assert table[2] == [ID, "4", f"{size / 1000:.0f} kB", "3 hours ago"]
    assert table[4] == ["DOWNLOAD", "SIZE", "LAST USED"]
    assert table[5][0] == ID
    assert table[5][-1] == "converted"
    assert "npqwen rm --download MODEL removes it, and keeps the conversion." in out

    found = json.loads(run("list", "--json")[1])
    ours, theirs = found["conversions"]
    assert (ours["model"], ours["bits"], ours["revisions"], ours["stale"]) == (str(checkpoint), 8, {}, None)
    assert (theirs["model"], theirs["bits"], theirs["bytes"], theirs["path"]) == (ID, 4, size, str(place))
    assert list(theirs["revisions"]) == ["main"]
    assert theirs["last_used"].endswith("+00:00")
    (download,) = found["downloads"]
    assert (download["model"], download["use"]) == (ID, "converted")
    assert download["path"] == str(tmp_path / "hf" / "models--org--name")


def test_rm_removes_what_is_named_and_nothing_else(run: Run, checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    kept = Path(run("pull", checkpoint)[1].strip())
    places = [Path(run("pull", ID, "--bits", bits)[1].strip()) for bits in (4, 8)]
    status, out, err = run("rm", ID, "--bits", "8", "-y")
    assert (status, out) == (0, "")
    assert "removed 1 conversion" in err.splitlines()
    assert err.splitlines()[-1].endswith(f", is kept; npqwen rm --download {ID} removes it")
    assert rows(err)[0][:2] == [ID, "8 bits"]
    assert [place.exists() for place in (kept, *places)] == [True, True, False]
    assert run("rm", "name", "--yes")[0] == 0
    assert not places[0].parent.exists()
    assert (tmp_path / "hf" / "models--org--name").exists()
    assert run("rm", str(checkpoint), "--yes")[0] == 0
    assert not kept.exists()
    assert (checkpoint / "model.safetensors").exists()


def test_rm_of_a_download(run: Run, tmp_path: Path, fake_hub: FakeHub) -> None:
    """Another program's model stays, and is none of ours."""
    from huggingface_hub import snapshot_download

    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    fake_hub.publish("org/bert", tmp_path / "bert")
    snapshot_download("org/bert", cache_dir=tmp_path / "hf")
    run("pull", ID)
    run("rm", ID, "--yes")
    assert run("list", "--json")[1].count("not converted") == 1
    status, out, err = run("rm", ID, "--yes")
    assert (status, out) == (2, "")
    assert err == "npqwen: error: org/name is not converted; npqwen rm --download org/name removes its download\n"
    status, out, err = run("rm", "org/bert", "--download", "--yes")
    assert (status, err) == (2, "npqwen: error: no model 'org/bert' is in the cache; see npqwen list\n")
    status, out, err = run("rm", "--download", ID, "--yes")
    assert (status, out) == (0, "")
    assert "Other programs that use these downloads will have to download them again." in err
    assert err.splitlines()[-1] == "removed 1 download"
    assert not (tmp_path / "hf" / "models--org--name").exists()
    assert (tmp_path / "hf" / "models--org--bert").exists()


def test_rm_of_a_download_keeps_the_conversion(run: Run, tmp_path: Path, fake_hub: FakeHub) -> None:
    status, out, err = run("pull", ID)
    place = Path(out.strip())
    assert err.splitlines()[-1].endswith(f" is not needed to run the model; npqwen rm --download {ID} removes it")
    status, _, err = run("rm", "--download", ID, "--yes")
    assert status == 0
    assert rows(err)[0][:2] + rows(err)[0][3:] == [ID, "download", "converted"]
    assert err.splitlines()[-1] == "removed 1 download"
    assert not (tmp_path / "hf" / "models--org--name").exists()
    fetched = len(fake_hub.downloads)
    assert run("pull", ID)[1] == f"{place}\n"
    assert len(fake_hub.downloads) == fetched
    _, _, err = run("rm", "--download", ID, "--yes")
    assert err == f"npqwen: error: {ID} has no download; without --download, rm removes its conversions\n"


def test_rm_of_both_and_of_several(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    run("pull", ID)
    run("pull", checkpoint)
    _, _, err = run("rm", ID, checkpoint, "--all", "--yes")
    assert err.splitlines()[-1] == "removed 2 conversions and 1 download"
    assert run("list")[1] == "no model is converted yet; npqwen pull MODEL converts one\n"
    assert checkpoint.exists()


@pytest.mark.parametrize("command", ["rm", "verify"])
def test_a_name_that_several_models_have_is_refused(
    command: str, run: Run, checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    places = [Path(run("pull", one)[1].strip()) for one in (checkpoint, other)]
    status, _, err = run(command, checkpoint.name)
    given = ", ".join(sorted([str(checkpoint), str(other)]))
    assert status == 2
    assert err == f"npqwen: error: {checkpoint.name!r} is the name of several models; give one of {given}\n"
    assert all(place.exists() for place in places)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["org/nam"], "no model 'org/nam' is in the cache; did you mean org/name?"),
        ([ID, "zzz"], "no model 'zzz' is in the cache; see npqwen list"),
        ([ID, "--bits", "8"], "org/name is not converted to 8 bits, but to 4"),
        ([ID], "nothing was removed, since stdin is not a terminal to ask on; confirm with --yes"),
        ([ID, "--bits", "4", "--download"], "--bits, --download and --all exclude each other; give one of them"),
        ([], "Missing argument 'MODEL...'; see npqwen rm --help"),
    ],
)
def test_rm_refuses_and_removes_nothing(
    args: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(run("pull", ID)[1].strip())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n")))
    status, out, err = run("rm", *args)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"npqwen: error: {message}"
    assert place.exists()


def test_cache_tells_where_and_how_large(run: Run, cache: Path, tmp_path: Path) -> None:
    place = Path(run("pull", ID)[1].strip())
    (cache / "kernels" / "avx2-00").mkdir(parents=True)
    (cache / "kernels" / "avx2-00" / "code").write_bytes(b"x" * 2_000_000)
    (cache / "history").write_bytes(b"x" * 100)
    status, out, err = run("cache")
    assert (status, err) == (0, "")
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    lines = out.splitlines()
    assert lines[0] == f"{cache}: {(size + 2_000_100) / 1e6:.1f} MB"
    assert rows(out)[1:4] == [
        ["history", "100 B", "what was entered in conversations"],
        ["hub", f"{size / 1000:.0f} kB", "conversions of models of the hub"],
        ["kernels", "2.0 MB", "compiled kernels"],
    ]
    assert "2.0 MB of it will not be used again: npqwen cache prune removes that" in out
    assert f"of downloads ({ID}); npqwen list shows them" in out
    found = json.loads(run("cache", "--json")[1])
    assert found["path"] == str(cache)
    assert found["bytes"] == sum(found["parts"].values()) == size + 2_000_100
    assert found["prunable"]["bytes"] == 2_000_000
    assert [item["path"] for item in found["prunable"]["items"]] == [str(cache / "kernels" / "avx2-00")]
    assert found["downloads"]["models"] == [ID]


def test_prune_removes_what_is_not_used_again(run: Run, fake_hub: FakeHub, checkpoint: Path, cache: Path) -> None:
    old = Path(run("pull", ID)[1].strip())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 5_000_000.0}))
    fake_hub.publish(ID, checkpoint)
    new = Path(run("pull", ID)[1].strip())
    assert old != new
    assert "stale: a newer conversion has replaced it" in run("list")[1]
    status, out, err = run("cache", "prune", "--dry-run")
    assert (status, out) == (0, "")
    assert f"  {ID}, 4 bits: a newer conversion has replaced it" in err
    assert err.splitlines()[-1].endswith(" would be freed")
    assert old.exists()
    assert run("cache", "prune")[0] == 2  # nobody to ask
    assert old.exists()
    status, out, err = run("cache", "prune", "--yes")
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].endswith(" freed")
    assert (old.exists(), new.exists()) == (False, True)
    assert run("cache", "prune", "--yes") == (0, "", f"nothing to remove in {cache}\n")


# --- on a terminal ---


class Terminal:
    """A command in a terminal."""

    def __init__(self, cache: Path, *args: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        code = "import sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        code += "from npqwen.__main__ import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"NPQWEN_CACHE": str(cache), "HF_HOME": str(cache / "hf"), "TERM": "xterm"},
        )  # fmt: skip
        os.close(slave)

    def until(self, text: str) -> str:
        """Everything written, up to the text or, if it is empty, to the end."""
        seen = ""
        while not text or text not in seen:
            assert select.select([self.master], [], [], 60)[0], seen
            try:
                read = os.read(self.master, 4096)
            except OSError:  # Linux: the command has ended
                read = b""
            if not read:
                break
            seen += read.decode()
        return seen

    def answer(self, keys: str) -> tuple[int, str]:
        """Exit status, and what was written after these keys."""
        os.write(self.master, keys.encode())
        seen = self.until("")
        status = self.process.wait(60)
        os.close(self.master)
        return status, seen


@pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
@pytest.mark.parametrize(
    ("keys", "status", "removed"),
    [
        ("y\n", 0, True),
        ("YES\n", 0, True),
        ("\n", 1, False),
        ("n\n", 1, False),
        ("\x04", 1, False),  # Ctrl-D
        ("\x03", 130, False),  # Ctrl-C
    ],
)
@pytest.mark.parametrize("command", ["rm", "prune"])
def test_removing_asks_first(
    command: str, keys: str, status: int, removed: bool, cache: Path, tmp_path: Path
) -> None:
    from converted import small_model

    place = small_model(cache / "local" / "model" / "0123456789ab-01234567-int4-v1", 4)
    terminal = Terminal(cache, *(["rm", str(place)] if command == "rm" else ["cache", "prune"]))
    asked = terminal.until("[y/N] ")
    assert ("Remove 1 conversion? [y/N] " if command == "rm" else "Remove these, ") in asked
    found, seen = terminal.answer(keys)
    assert found == status, seen
    assert place.exists() != removed
    assert "Traceback" not in seen
    if status == 1:
        assert "nothing was removed" in seen


# --- columns ---


def test_columns_and_times() -> None:
    assert columns([("a", "long", ""), ("bcd", "x", "note")]) == "a    long\nbcd  x     note\n"
    now = 1_700_000_000.0
    day = 86400
    for seconds, words in {
        0: "just now", -5: "just now", 59: "just now", 60: "1 minute ago", 3599: "59 minutes ago", 3600: "1 hour ago",
        day - 1: "23 hours ago", day: "1 day ago", 30 * day - 1: "29 days ago",
    }.items():  # fmt: skip
        assert ago(now - seconds, now) == words
    assert ago(now - 400 * day, now) in ("2022-10-10", "2022-10-09", "2022-10-11")
