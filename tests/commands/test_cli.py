"""The command line: what it writes where, and how it ends. The NumPy reference stands in for the engine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import ReferenceModel

import npqwen.model
from npqwen.commands import cli
from npqwen.errors import NpqwenError
from npqwen.terminal.terminal import ERROR_LENGTH

TESTS = Path(__file__).parents[1]
TINY = TESTS.parent / "examples" / "tiny-qwen3"
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPQWEN_CACHE", str(place))
        yield place


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: status, out, err, and the model that was loaded."""
    done = SimpleNamespace(model=None)

    def load(path: Path, *, threads: Any, context: Any, on_compile: Any, name: str, **_: Any) -> ReferenceModel:
        assert name == TINY.name
        on_compile(0, 3)
        on_compile(3, 3)
        done.threads = threads
        done.model = model = ReferenceModel.from_directory(TINY, context)
        return model

    monkeypatch.setattr(npqwen.model, "load", load)

    def command(*args: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as exit:
            cli.main(list(args))
        done.status = exit.value.code
        done.out, done.err = capsys.readouterr()
        return done

    return command


def test_generate_writes_text_to_stdout_and_the_rest_to_stderr(run: Run) -> None:
    done = run("generate", str(TINY), SUM, "--temperature", "0")
    assert (done.status, done.out) == (0, f"{ANSWER}\n")
    converting, compiling, statistics = done.err.splitlines()
    assert converting.startswith(f"converting {TINY} to int4, once, into ")
    assert compiling == "compiling kernels (once on this machine for each kind of model and cache)"
    assert statistics.startswith("prompt: 20 tokens in ")
    assert "text: 37 tokens" in statistics
    assert statistics.endswith("; the text ended")


def test_a_text_of_few_tokens_has_no_speed(run: Run) -> None:
    told = run("generate", str(TINY), SUM, "--temperature", "0", "-n", "1").err.splitlines()[-1]
    assert "text: 1 token, first after " in told
    assert ", then " not in told


def test_quiet_leaves_stderr_empty(run: Run) -> None:
    done = run("generate", str(TINY), SUM, "--temperature", "0", "--quiet")
    assert (done.out, done.err) == (f"{ANSWER}\n", "")


@pytest.mark.parametrize(
    ("options", "text", "end"),
    [
        (["--max-tokens", "4"], "<think>\n17", "--max-tokens reached"),
        (["--stop", " = 3", "--stop", "nowhere"], "<think>\n17 + 20", "stopped at ' = 3'"),
        (["--context", "22"], "<think>\n", "the context is full"),
    ],
)
def test_how_a_text_ends_is_told(run: Run, options: list[str], text: str, end: str) -> None:
    done = run("generate", str(TINY), SUM, "--temperature", "0", *options)
    assert done.out == f"{text}\n"  # one newline more than the text, which may end in newlines itself
    assert done.err.splitlines()[-1].endswith(f"; {end}")


def test_options_reach_the_sampler_and_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def sampler(sampling: Any, *rest: Any) -> Any:
        given.append(sampling)
        return lambda logits, allowed, maxima: 4098

    monkeypatch.setattr("npqwen.generation.decoding.Sampler", sampler)
    options = "--temperature 0.7 --top-k 3 --top-p 0.8 --min-p 0.1 --repetition-penalty 1.1"
    more = "--presence-penalty -0.5 --seed 9 --threads 3 --frequency-penalty 0.25"
    bias = "--logit-bias 5=-inf --logit-bias 7=2.5"
    done = run("generate", str(TINY), "x", *options.split(), *more.split(), *bias.split())
    assert (done.status, done.out, done.threads) == (0, "\n", 3)
    penalties: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    rest: dict[str, Any] = {"logit_bias": {5: -math.inf, 7: 2.5}, "seed": 9}
    assert given == [npqwen.Sampling(temperature=0.7, top_k=3, top_p=0.8, min_p=0.1, **penalties, **rest)]


def test_a_text_that_repeats_itself_is_ended_if_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npqwen.LoopGuard.__init__, "__defaults__", (50, 50, 4, 16))
    command = ["generate", str(TINY), "x", "--logit-bias", "40=1e9", "--temperature", "0", "--max-tokens", "60"]
    done = run(*command, "--loop-guard")
    assert done.err.splitlines()[-1].endswith("; the text repeated itself")
    assert "text: 50 tokens" in done.err
    assert run(*command).err.splitlines()[-1].endswith("; --max-tokens reached")


def test_a_seed_repeats_the_text(run: Run) -> None:
    command = ["generate", str(TINY), "A river is", "--max-tokens", "9", "--seed"]
    texts = [run(*command, seed).out for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def test_convert_prints_where(run: Run, tmp_path: Path, cache: Path) -> None:
    done = run("convert", str(TINY), str(tmp_path / "out"), "--bits", "16")
    assert (done.status, done.out) == (0, f"{tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = run("convert", str(TINY), str(tmp_path / "out"))
    assert again.status == 2
    assert again.err.startswith("npqwen: error: ")
    assert "--force" in again.err
    assert run("convert", str(TINY), str(tmp_path / "out"), "--force").status == 0
    assert Path(run("convert", str(TINY)).out.strip()).is_relative_to(cache)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "/no/such", "x"], "'/no/such' is neither a directory nor a hub id like Qwen/"),
        (["generate", str(TINY), ""], "the prompt is empty, and Qwen3 has no start token; give"),
        (["generate", "/no/such", "x", "--top-p", "3"], "top_p is 3.0; it must be a number from 0 to 1"),
        (["generate", "/no/such", "x", "--max-tokens", "0"], "max_tokens is 0; it must be a whole number"),
        (["generate", str(TINY), SUM, "--context", "20"], "the prompt is too long: it takes 20 tokens"),
        (["generate", str(TINY), "x", "--bits", "5"], "bits is 5; it can be 3, 4, 8 or 16"),
        (["generate", str(TINY), "x", "--temprature", "1"], "No such option '--temprature'"),
        (["generate", str(TINY)], "Missing argument 'PROMPT'; see npqwen generate --help"),
        (["generate", str(TINY), "x", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["generate", str(TINY), "x", "--logit-bias", "a=1"], "Invalid value for '--logit-bias': 'a=1' is not a token"),
        (["generate", str(TINY), "x", "--logit-bias", "5"], "Invalid value for '--logit-bias': '5' is not a token id"),
        (["generate", "/no/such", "x", "--logit-bias", "5=nan"], "logit_bias[5] is nan; it must be a number, or"),
        (["generate", "/no/such", "x", "--logit-bias", "-5=1"], "logit_bias has the key -5; each must be a token"),
        (["generate", str(TINY), "x", "--logit-bias", "4128=1"], "logit_bias has token id 4128; the model's are 0"),
        (["convert", "/no/such", "/tmp/out"], "'/no/such' is neither a directory nor a hub id"),
        (["convert", str(TINY), "/tmp/out", "--calibrate", "x" * 300], "x" * 60),
        (["speak"], "No such command 'speak'; see npqwen --help"),
    ],
)
def test_errors_are_one_line_and_status_2(run: Run, args: list[str], message: str) -> None:
    done = run(*args)
    assert done.status == 2
    assert done.out == ""
    line = done.err.splitlines()[-1]
    assert line.startswith(f"npqwen: error: {message}")
    assert "Traceback" not in done.err


def test_any_error_of_ours_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise NpqwenError("first\nsecond")

    monkeypatch.setattr("npqwen.hub.resolve", fail)
    done = run("generate", str(TINY), "x")
    assert (done.status, done.err) == (2, "npqwen: error: first second\n")


def test_an_error_cannot_give_a_terminal_orders(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise NpqwenError("the template says \x1b]52;c;eA==\x07no\x9b2J")

    monkeypatch.setattr("npqwen.hub.resolve", fail)
    assert run("generate", str(TINY), "x").err == "npqwen: error: the template says ]52;c;eA==no2J\n"


def test_a_notice_cannot_control_a_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = "npqwen.hub.conversions"
    monkeypatch.setattr(f"{hub}.look_up", lambda name: (None, "the hub says \x1b]0;title\x07no"))
    (tmp_path / "my\x7fmodel").mkdir()
    monkeypatch.setattr(f"{hub}._newest_conversion", lambda name, recipe: tmp_path / "my\x7fmodel")
    assert f"the hub says ]0;titleno; using {tmp_path}/mymodel" in run("info", "org/name").err


@pytest.mark.parametrize("words", [["x" * 1_000_000], ["a b"] * 100_000])
def test_an_error_that_quotes_a_long_text_stays_short(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise NpqwenError(f"the tensor {' '.join(words)} is damaged; convert it again")

    monkeypatch.setattr("npqwen.hub.resolve", fail)
    done = run("generate", str(TINY), "x")
    assert done.status == 2
    assert len(done.err) <= ERROR_LENGTH + len("npqwen: error: \n")
    assert done.err.startswith("npqwen: error: the tensor ")
    assert done.err.endswith(" is damaged; convert it again\n")


def test_a_usage_error_about_a_long_value_stays_short(run: Run) -> None:
    done = run("generate", str(TINY), "x", "--prefix-cache-size", "x" * 5000)
    assert done.status == 2
    assert len(done.err) <= ERROR_LENGTH + len("npqwen: error: \n")
    assert done.err.endswith("; see npqwen generate --help\n")


def test_running_out_of_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError("Unable to allocate\n3 TB")

    monkeypatch.setattr("npqwen.hub.resolve", fail)
    done = run("generate", str(TINY), "x")
    assert done.status == 2
    assert done.err.startswith("npqwen: error: out of memory (Unable to allocate 3 TB); ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("setting", ["NUMBA_DISABLE_JIT=1", "NUMBA_NUM_THREADS=0", "NUMBA_NUM_THREADS=x"])
@pytest.mark.parametrize("command", [["generate", str(TINY), "x"], ["convert", str(TINY)], ["info", str(TINY)]])
def test_settings_of_numba_that_prevent_compilation_are_refused(setting: str, command: list[str]) -> None:
    """In a process of its own, in which Numba has not been imported."""
    name, value = setting.split("=")
    program = [sys.executable, "-m", "npqwen", *command]
    done = subprocess.run(program, env=os.environ | {name: value}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(f"npqwen: error: {name} is ")
    assert done.stderr.endswith("unset it\n")
    assert done.stderr.count("\n") == 1


def test_an_error_takes_an_unfinished_bar_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, progress: Any, **options: Any) -> None:
        progress(1, 10)
        raise NpqwenError("no room")

    monkeypatch.setattr("npqwen.terminal.terminal.Terminal.shows_bars", True)
    for name, command in (("convert", ["convert", "x"]), ("resolve", ["pull", "x"]), ("resolve", ["bench", "x"])):
        monkeypatch.setattr(f"npqwen.hub.{name}", fail)
        done = run(*command)
        assert "converting: " in done.err
        assert done.err.rpartition("\r")[2] == "npqwen: error: no room\n"


def test_an_error_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("npqwen.hub.resolve", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", str(TINY), "x"])


def test_help_and_version(run: Run) -> None:
    assert run("--version").out == f"npqwen {npqwen.__version__}\n"
    alone = run()
    assert alone.status == 0
    told = alone.out
    done = run("--help")
    assert done.status == 0
    assert done.out == told
    assert "generate" in done.out
    assert "convert" in done.out
    for command in ("generate", "convert"):
        assert run(command, "-h").status == 0


def test_progress_bars_only_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet = run("convert", str(TINY), str(tmp_path / "a"))
    assert "%" not in quiet.err
    monkeypatch.setattr("npqwen.terminal.terminal.Terminal.shows_bars", True)
    shown = run("convert", str(TINY), str(tmp_path / "b"))
    assert "converting: " in shown.err
    long = run("generate", str(TINY), "a " * 400, "--max-tokens", "1")
    assert "reading the prompt: " in long.err
    assert "compiling kernels (once): " in long.err


def test_the_package_imports_fast_and_help_too() -> None:
    heavy = {"numpy", "numba", "tokenizers", "huggingface_hub", "tqdm", "npqwen_quant", "npqwen.model"}
    heavy |= {"asyncio", "jinja2", "prompt_toolkit"}
    for code, more in (
        ("import npqwen", {"click"}),
        ("import npqwen; npqwen.OptionError, npqwen.__version__, dir(npqwen)", {"click"}),
        *(
            (f"from npqwen.commands.cli import main\ntry: main({command})\nexcept SystemExit: pass", set())
            for command in (["--help"], ["chat", "--help"], ["generate", "--help"])
        ),
    ):
        check = f"{code}\nimport sys\nfound = {heavy | more!r} & set(sys.modules)\nassert not found, found"
        command = [sys.executable, "-c", check]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    assert all(getattr(npqwen, name) is not None for name in npqwen.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        npqwen.nonsense  # noqa: B018


def test_load_resolves_then_loads(run: Run, tmp_path: Path) -> None:
    notices: list[str] = []
    compiled: list[tuple[int, int]] = []
    model = npqwen.load(
        TINY, bits=8, context=99, notice=notices.append, on_compile=lambda *state: compiled.append(state)
    )
    assert model.context == 99
    assert "to int8, once, into" in notices[0]
    assert compiled == [(0, 3), (3, 3)]
