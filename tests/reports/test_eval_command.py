"""`npqwen eval`: its output, what it stores, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY
from npqwen_quant import convert

from npqwen.format.quantization import EvaluationRecord, Quantization, store_evaluation
from npqwen.model import load
from npqwen.reports.info import describe, inspect

TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text(TEXT[:3000], encoding="utf-8")
    return path


def test_eval_for_programs(run: Run, tiny: Callable[[int], Path], text: Path) -> None:
    load(tiny(4), threads=1).close()  # compiling kernels would print progress
    load(tiny(16), threads=1).close()
    options = ["--window", "128", "--prompts", "4", "--threads", "2", "--layers", "--json"]
    out, err = run("eval", tiny(4), text, "--against", tiny(16), *options)
    assert err == ""
    found = json.loads(out)
    assert (found["model"], found["encoding"]) == (str(tiny(4)), "int4")
    assert (found["against"], found["against_encoding"]) == (str(tiny(16)), "bf16")
    assert (found["window"], found["stride"]) == (128, 128)
    assert list(found["texts"]) == [str(text)]
    total = found["total"]
    assert total == found["texts"][str(text)]
    assert total["perplexity"]["mean"] == pytest.approx(math.exp(total["nll"]["mean"]))
    assert 0 < total["divergence"]["kl"]["mean"] < total["divergence"]["kl_99"] < total["divergence"]["kl_max"]
    assert 0.9 < total["divergence"]["top_1"]["mean"] <= 1
    assert (found["greedy"]["prompts"], found["greedy"]["tokens"]) == (4, 16)
    assert found["layers"]["parts"][0]["part"] == "embedding"


def test_eval_for_people(
    run: Run, tiny: Callable[[int], Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text.parent / "b.txt").write_bytes(b"\xef\xbb\xbfWhat is 17 + 25?")
    out, _ = run("eval", tiny(4), text, text.parent / "b.txt", "--quiet", "--threads", "1")
    lines = out.splitlines()
    assert lines[0] == f"{tiny(4)} (int4): windows of 512 tokens, stride 512"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["text", "---", str(text), str(text.parent / "b.txt"), "all"]
    assert all(len(row) == 4 for row in rows)
    assert re.fullmatch(r"\d+\.\d{3} ± \d+\.\d{3}", rows[-1][3])
    out, _ = run("eval", tiny(4), text, "--against", tiny(16), "--layers", "--prompts", "2", "-q")
    for line in out.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert "| continuations equal throughout | " in out
    assert "| the whole model | " in out


def test_eval_of_stdin(run: Run, tiny: Callable[[int], Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    from types import SimpleNamespace

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.read_bytes()), isatty=lambda: False))
    piped = json.loads(run("eval", tiny(4), "-", "--json", "-q")[0])
    assert piped["total"] == json.loads(run("eval", tiny(4), text, "--json", "-q")[0])["total"]
    assert list(piped["texts"]) == ["stdin"]


def test_a_checkpoint_is_compared_with_itself_in_bf16(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    out, err = run("eval", TINY, text, "--against", TINY, "--bits", "8", "--json", "--prompts", "0")
    found = json.loads(out)
    assert (found["encoding"], found["against_encoding"]) == ("int8", "bf16")
    assert found["total"]["divergence"]["kl"]["mean"] < 1e-4
    assert re.findall(r"converting .* to (\w+), once", err) == ["int8", "bf16"]


def test_what_is_stored_is_shown(run: Run, text: Path, tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    convert(TINY, tmp_path / "model", bits=4)
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "evaluation" not in run("info", tmp_path / "model")[0]
    command = ["eval", tmp_path / "model", text, "--against", tiny(16), "--json", "--store", "--prompts", "0"]
    out, err = run(*command)
    assert err.splitlines()[-1] == f"stored in {tmp_path / 'model' / 'config.json'}"
    total = json.loads(out)["total"]
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    kept = stored["quantization_config"].pop("evaluation")
    assert stored == before
    assert (kept["text"], kept["tokens"], kept["against"]) == ("some text.txt", total["tokens"], "bf16")
    assert (kept["window"], kept["stride"]) == (512, 512)
    assert kept["kl_divergence"] == total["divergence"]["kl"]["mean"]
    assert kept["top_1"] == total["divergence"]["top_1"]["mean"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(
        path.name for path in tiny(4).iterdir()
    )
    shown = run("info", tmp_path / "model")[0]
    (line,) = (line for line in shown.splitlines() if line.startswith("evaluation "))
    assert f"KL divergence {kept['kl_divergence']:.7f} ± " in line
    assert line.endswith(f"from bf16, same top-1 {kept['top_1']:.2%}; {kept['tokens']} tokens of some text.txt")
    assert json.loads(run("info", tmp_path / "model", "--json")[0])["evaluation"] == kept
    assert Quantization.from_directory(tmp_path / "model").as_dict()["quantization_config"]["evaluation"] == kept


@pytest.mark.parametrize(
    "damage",
    [
        {"text": 3}, {"tokens": "9"}, {"tokens": 1.5}, {"tokens": True}, {"kl_divergence": -1.0}, {"top_1": None},
        {"kl_error": math.nan}, {"perplexity": 10**400}, {"perplexity": math.inf}, None, [], "x",
    ],
)  # fmt: skip
def test_a_damaged_record_is_as_none(tiny: Callable[[int], Path], tmp_path: Path, damage: Any) -> None:
    record = EvaluationRecord("a text", 10, 512, 512, "bf16", 2.0, 0.001, 0.0001, 0.99)
    convert(TINY, tmp_path / "model", bits=4)
    store_evaluation(tmp_path / "model", record)
    assert Quantization.from_directory(tmp_path / "model").evaluation == record
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    kept = config["quantization_config"]
    kept["evaluation"] = kept["evaluation"] | damage if isinstance(damage, dict) else damage
    path.write_text(json.dumps(config))
    assert Quantization.from_directory(tmp_path / "model").evaluation is None
    assert "evaluation" not in describe(inspect(tmp_path / "model"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\x80\x81", "is not UTF-8 (at byte 0)"),
        (b"abc\0def", "is not text: it contains NUL bytes"),
        (b"a", "is too short; a text must have at least 2 tokens"),
        (None, "cannot be read: No such file"),
        ("directory", "cannot be read: Is a directory"),
        (b" a" * 9_000_000, "is larger than 16 MB"),
    ],
)
def test_texts_that_are_refused(
    run: Run, tiny: Callable[[int], Path], tmp_path: Path, content: Any, problem: str
) -> None:
    path = tmp_path / "text"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    out, err = run("eval", tiny(4), path, "--threads", "1", status=2)
    assert out == ""
    assert re.fullmatch(rf"npqwen: error: {re.escape(str(path))} {re.escape(problem)}.*\n", err.splitlines(True)[-1])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--layers"], "--layers needs a model to compare with; give one with --against"),
        (["--store"], "--store needs a model to compare with; give one with --against"),
        (["--window", "1"], "window is 1; it must be a whole number from 2 to 2048"),
        (["--window", "9999"], "window is 9999; it must be a whole number from 2 to 2048"),
        (["--stride", "513"], "stride is 513; it must be a whole number from 1 to 512"),
        (["--against", "SAME"], "SAME would be compared with itself; give another model with --against"),
        (["--against", "/nowhere"], "'/nowhere' is neither a directory"),
        (["TEXT"], "TEXT is given twice"),
    ],
)
def test_eval_refuses(
    run: Run, tiny: Callable[[int], Path], text: Path, options: list[str], problem: str
) -> None:
    names = {"SAME": str(tiny(4)), "TEXT": str(text)}
    out, err = run("eval", tiny(4), text, *(names.get(o, o) for o in options), "--threads", "1", status=2)
    assert out == ""
    for name, value in names.items():
        problem = problem.replace(name, value)
    assert err.splitlines()[-1].startswith(f"npqwen: error: {problem}")


def test_eval_without_a_text_is_a_usage_error(run: Run, tiny: Callable[[int], Path]) -> None:
    _, err = run("eval", tiny(4), status=2)
    assert err == "npqwen: error: Missing argument 'TEXT...'; see npqwen eval --help\n"


def test_a_plot_without_matplotlib_is_one_line(
    run: Run, tiny: Callable[[int], Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    out, err = run("eval", tiny(4), text, "--plot", text.parent / "plot.png", status=2)
    assert out == ""
    assert err == "npqwen: error: a plot needs matplotlib; install it: python -m pip install matplotlib\n"


def test_a_plot(run: Run, tiny: Callable[[int], Path], text: Path) -> None:
    pytest.importorskip("matplotlib")
    _, err = run("eval", tiny(4), text, "--plot", text.parent / "plot.txt", status=2)
    assert "does not have the suffix of a plot: ." in err
    for options in ([], ["--against", tiny(16), "--layers", "--prompts", "0"]):
        path = text.parent / f"plot-{len(options)}.png"
        run("eval", tiny(4), text, "--plot", path, "-q", *options)
        assert path.read_bytes().startswith(b"\x89PNG")
