"""`npqwen doctor`: what it forecasts, and what it finds in caches that are damaged by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY
from converted import small_model
from fake_system import raspberry_pi, tree
from memory_table import needs, whole

from npqwen.format.config import Config, read_json
from npqwen.hub.downloads import Download
from npqwen.model import load
from npqwen.reports import doctor, extras, forecast
from npqwen.reports.bandwidth import ReadBandwidth
from npqwen.reports.bench import bytes_per_token
from npqwen.reports.cache_checks import check_cache, check_downloads
from npqwen.reports.finding import Finding
from npqwen.reports.forecast import SHARE, forecasts
from npqwen.simd.isa import available

Run = Callable[..., tuple[str, str]]
PLACE = "hub/org--name/0123456789ab-01234567-int4-v2"
posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache of huggingface_hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def conversion(cache: Path, tiny: Callable[[int], Path]) -> Path:
    """The example model in the cache, as a model of the hub."""
    path = Path(shutil.copytree(tiny(4), cache / PLACE))
    entry = {"record_version": 1, "model": "org/name", "revisions": {"main": "a" * 40}, "replaced": False}
    (path / "npqwen-source.json").write_text(json.dumps(entry))
    return path


def found(cache: Path) -> list[Finding]:
    return list(check_cache(cache))


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- forecasts ---


def shape_of(model: str) -> str:
    """The key of `make_checkpoint.SIZES` for a model's name."""
    return model.removeprefix("Qwen3-").removeprefix("Qwen")


def test_memory_is_that_of_the_documents() -> None:
    """memory_table.py computes it from files that it writes; docs/models.md has its numbers."""
    for one in forecasts(None, None, threads=4):
        computed = needs(shape_of(one.model), one.bits)
        assert (one.weights, one.needed) == (computed.weights, computed.needed), one
        assert (one.fit, one.tokens_per_second) == ("fits", None)


def test_shapes_are_those_of_the_models() -> None:
    for name, raw in forecast.MODELS.items():
        assert Config.from_dict(raw) == Config.from_dict(whole(shape_of(name)))


@pytest.mark.parametrize("directory", [TINY, Path(__file__).parents[1] / "data" / "tiny-qwen3-moe"])
def test_the_speed_is_the_bandwidth_by_the_bytes_that_a_token_reads(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npqwen_quant import convert

    monkeypatch.setattr(forecast, "MODELS", {"small": read_json(directory / "config.json")})
    for one in forecasts(None, 1e9, threads=1):
        convert(directory, tmp_path / str(one.bits), bits=one.bits)
        with load(tmp_path / str(one.bits), threads=1) as model:
            assert one.tokens_per_second == SHARE * 1e9 / bytes_per_token(model, 512)
            assert one.weights == model.weight_bytes


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(available: int, model: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(forecast, "MODELS", {model: forecast.MODELS[model]})
            return next(one.fit for one in forecasts(available, 1e9, 1) if one.bits == 4)

    needed = {one.model: one.needed for one in forecasts(None, 1e9, 1) if one.bits == 4}
    for model, bytes_needed in needed.items():
        assert fit(bytes_needed, model) == "fits"
        assert fit(bytes_needed - 1, model) != "fits"
    assert fit(needed["Qwen3-8B"] - 1, "Qwen3-8B") == "no"
    assert fit(12 << 30, "Qwen3-30B-A3B") == "partly"
    assert fit(6 << 30, "Qwen3-30B-A3B") == "no"
    (cell,) = (one.cell() for one in forecasts(12 << 30, 1e9, 4) if (one.model, one.bits) == ("Qwen3-30B-A3B", 4))
    assert cell == "17.3 GB, from disk"


# --- the command ---


@pytest.mark.usefixtures("cache", "no_hub")
def test_a_sound_machine_has_no_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadBandwidth, "measure", lambda self, repeat=3: 10e9)
    out, err = run("doctor")
    assert err == ""
    assert "10.0 GB/s read" in out
    assert "\nNo problems.\n" in out
    assert max(map(len, out.partition("MODEL")[2].partition("No problems")[0].splitlines())) < 80
    facts = json.loads(run("doctor", "--json")[0])
    assert facts["well"] is True
    assert not any(one["is_problem"] for one in facts["findings"])
    assert facts["machine"]["read_bandwidth"] == 10e9
    assert {one["name"]: one["installed"] for one in facts["extras"]}["server"] is True
    assert len(facts["models"]) == len(forecast.MODELS) * len(forecast.BITS)
    assert facts["cache"]["conversions"] == 0


@pytest.mark.usefixtures("no_hub")
def test_a_problem_is_the_exit_status_and_has_a_remedy(run: Run, conversion: Path) -> None:
    assert "No problems." in run("doctor")[0]
    (conversion / "tokenizer.json").write_text("{}")
    out, _ = run("doctor", status=1)
    assert "1 problem:\n* org/name, 4 bits, in " in out
    assert "tokenizer.json is damaged, or was edited\n  -> npqwen convert org/name --bits 4 --force\n" in out
    assert json.loads(run("doctor", "--json", status=1)[0])["well"] is False


def test_numbers_of_a_small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = raspberry_pi(tmp_path)
    tree(root, {"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 500000 kB\nSwapTotal: 100 kB\nSwapFree: 10 kB"})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ReadBandwidth, "measure", lambda self, repeat=3: 10e9)
    monkeypatch.setattr(doctor, "downloads", list)
    monkeypatch.setattr("npqwen.reports.cache_checks.damaged_downloads", list)
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    seen = doctor.examine(root)
    assert not seen.is_well
    text = seen.describe()
    assert "Raspberry Pi 5 Model B" in text
    assert "only 512 MB of memory is available" in text
    assert "92.2 kB of 102 kB of swap space is in use" in text or "92 kB of 102 kB" in text
    assert all(one.fit == "no" for one in seen.models)


def test_kernels_that_are_not_the_best_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor._check_kernels()) == [] or os.environ.get("NPQWEN_ISA")
    offered = available()
    better = type("Better", (offered[0],), {"name": "better"})
    monkeypatch.setattr(doctor, "available", lambda: [better, *offered])
    monkeypatch.setenv("NPQWEN_ISA", offered[0].name)
    assert f"NPQWEN_ISA={offered[0].name} replaces better" in only(list(doctor._check_kernels())).text
    monkeypatch.setattr(doctor, "available", lambda: offered[-1:])
    assert "portable ones run instead" in only(list(doctor._check_kernels())).text


# --- extras ---


def test_extras_are_those_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, (packages, _) in extras.EXTRAS.items():
        (line,) = re.findall(rf"^{name} = (\[.*\])$", text, re.M)
        named = {re.split(r"[\[>]", one)[0] for one in json.loads(line)}
        assert named - {"npqwen"} == set(packages)


def test_an_extra_that_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "EXTRAS", {"server": (("no-such-package", "click"), "npqwen serve")})
    (missing,) = extras.extras()
    assert not missing.is_installed
    assert missing.describe() == 'server not installed, which npqwen serve need: pip install "npqwen[server]"'
    assert list(doctor._check_extras([missing])) == []  # an extra is optional

    def refuse(name: str) -> Any:
        raise ImportError("wrong ELF class")

    monkeypatch.setattr(extras, "import_module", refuse)
    (broken,) = extras.extras()
    finding = only(list(doctor._check_extras([broken])))
    assert finding.is_problem
    assert finding.text == "click is installed, but cannot be imported (ImportError: wrong ELF class)"
    assert finding.remedy == "pip install --force-reinstall click"


# --- the cache ---


def test_an_empty_cache_and_one_that_is_not_there_are_sound(cache: Path) -> None:
    assert found(cache) == []
    cache.mkdir(mode=0o700)
    assert found(cache) == []


def test_a_sound_conversion(cache: Path, conversion: Path) -> None:
    assert found(cache) == []


def test_damage_to_a_conversion(cache: Path, conversion: Path) -> None:
    weights = conversion / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    finding = only(found(cache))
    assert finding.is_problem
    assert str(weights.parent) in finding.text
    assert finding.remedy == "npqwen convert org/name --bits 4 --force"
    weights.unlink()
    assert "is missing" in only(found(cache)).text


def test_a_conversion_without_checksums_is_no_problem(cache: Path, conversion: Path) -> None:
    (conversion / "npqwen-checksums.json").unlink()
    finding = only(found(cache))
    assert not finding.is_problem
    assert "without checksums" in finding.text
    assert "org/name (4 bits)" in finding.text


def test_what_killed_conversions_left(cache: Path) -> None:
    folder = cache / "hub" / "org--name"
    left = folder / ".0123456789ab-01234567-int4-v2.partial-0123abcd"
    left.mkdir(parents=True)
    (left / "journal.json").write_bytes(b"x" * 5000)
    finding = only(found(cache))
    assert not finding.is_problem
    assert finding.text == "5 kB of the cache can be freed: an interrupted conversion, which could be resumed"
    small_model(left / "old")
    aside = only(found(cache))
    assert aside.is_problem
    assert str(left / "old") in aside.text
    assert "puts it back" in aside.remedy


@posix
def test_a_cache_that_others_may_write_to(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    finding = only(found(cache))
    assert finding.is_problem
    assert "others may write to it" in finding.text
    assert finding.remedy.startswith("chmod o-w ")
    cache.chmod(0o775)  # as with the umask 002 of many systems
    assert found(cache) == []


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "nothing can be written to the cache" in only(found(cache)).text


def test_a_cache_that_is_a_file(cache: Path) -> None:
    cache.write_text("")
    assert "is not a directory" in only(found(cache)).text


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npqwen.reports.cache_checks.free_bytes", lambda place: 5_000_000)
    assert "only 5.0 MB are free" in only(found(cache)).text


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel directory with two sound files, written as the cache writes them."""
    from npqwen.kernels.compiled import _Files

    directory = cache / "kernels" / "best-0123"
    directory.mkdir(parents=True, mode=0o700)
    files = _Files(str(directory), "kernel", "stamp")
    files._write("kernel.nbi", b"index")
    files._write("kernel.nbc", b"code")
    monkeypatch.setattr("npqwen.reports.cache_checks.usable_directories", lambda: [directory])
    monkeypatch.setattr("npqwen.kernels.compiled.usable_directories", lambda: [directory])
    return directory


def test_sound_kernels(cache: Path, compiled: Path) -> None:
    assert found(cache) == []


def test_damaged_kernels(cache: Path, compiled: Path) -> None:
    code = compiled / "kernel.nbc"
    code.write_bytes(code.read_bytes()[:-1] + b"X")
    shutil.copy(compiled / "kernel.nbi", compiled / "other.nbi")  # another's content
    (compiled / "kernel.nbc.tmp.0123").write_bytes(b"")
    texts = [one.text for one in found(cache)]
    assert texts == [
        f"kernels: {code} is damaged",
        f"kernels: {compiled / 'kernel.nbc.tmp.0123'} is an interrupted write",
        f"kernels: {compiled / 'other.nbi'} is damaged",
    ]


@posix
def test_kernels_that_others_could_have_written(cache: Path, compiled: Path) -> None:
    (compiled / "kernel.nbc").chmod(0o666)
    assert "others may write to it" in only(found(cache)).text
    compiled.chmod(0o777)
    finding = only(found(cache))
    assert f"the kernels in {compiled} are not used" in finding.text
    assert finding.remedy.startswith("rm -r ")


@pytest.mark.usefixtures("no_hub")
def test_an_incomplete_download(tmp_path: Path) -> None:
    place = tmp_path / "hf" / "models--org--name"
    (place / "blobs").mkdir(parents=True)
    download = Download("org/name", place, ("a" * 40,), 0, 0.0, False)
    (place / "snapshots").mkdir()
    (place / "refs").mkdir()
    assert list(check_downloads([download])) == []
    (place / "blobs" / "0123.incomplete").write_bytes(b"x" * 2_000_000)
    finding = only(list(check_downloads([download])))
    assert not finding.is_problem
    assert finding.text == "the download of org/name is incomplete (2.0 MB)"
    (place / "snapshots").rmdir()
    assert "a download is damaged: " in [*check_downloads([download])][1].text


