"""The command line in processes of its own: signals, pipes, encodings. A slow NumPy model stands in for the engine."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference import ReferenceModel

from npqwen.terminal.terminal import Terminal

TESTS = Path(__file__).parents[1]
TINY = TESTS.parent / "examples" / "tiny-qwen3"
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42"

CHILD = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from reference import Path, ReferenceModel
import npqwen.model

class Slow(ReferenceModel):
    def forward(self, *args, **options):
        time.sleep(float(sys.argv[1]))
        return super().forward(*args, **options)

npqwen.model.load = lambda path, **options: Slow.from_directory(Path({str(TINY)!r}))
from npqwen.commands.cli import main
main(sys.argv[2:])
"""


# Its likeliest continuation is the prompt once more.
PARROT = """
class Parrot(Slow):
    def prefill(self, ids, cache, progress=None):
        self.script = [*ids, 4098]
        return self.forward(ids, cache)[-1]

    def forward(self, ids, cache, **options):
        logits = super().forward(ids, cache, **options)
        logits[-1, self.script.pop(0)] = 1e6
        return logits
"""


def child(*args: str, delay: float = 0, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(delay), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ascii_locale() -> dict[str, str]:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    return os.environ | plain


def test_text_comes_piece_by_piece_and_ctrl_c_keeps_it() -> None:
    if sys.platform == "win32":
        pytest.skip("sends SIGINT")
    process = child("generate", str(TINY), SUM, "--temperature", "0", delay=0.1)
    assert process.stdout is not None
    first = process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert text.endswith("\n")
    assert ANSWER.startswith(text[:-1])
    assert 3 <= len(text) < len(ANSWER)
    assert b"Traceback" not in errors
    assert b"error" not in errors


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = child("generate", str(TINY), SUM, "--temperature", "0", "--quiet", delay=0.02)
    assert process.stdout is not None
    assert process.stdout.read(3) == b"<th"
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 141
    assert errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", CHILD, "0", "generate", str(TINY), SUM, "--quiet"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=300)
    assert done.returncode == 2
    assert done.stderr == "npqwen: error: cannot write to stdout: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", [["--help"], ["chat", "--help"], ["--version"], []])
def test_help_that_cannot_be_written_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        arguments = [sys.executable, "-m", "npqwen", *command]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=300)
    assert done.returncode == 2
    assert done.stderr == "npqwen: error: cannot write to stdout: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_error_that_cannot_be_written_still_has_its_status() -> None:
    with open("/dev/full", "wb") as full:
        arguments = [sys.executable, "-m", "npqwen", "generate", "/no/such", "x"]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=full, timeout=300)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    script = """
import os, signal, sys, importlib.abc

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "npqwen.commands.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from npqwen.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_little_is_imported_before_ctrl_c_leaves_no_traceback() -> None:
    script = "import sys; before = {*sys.modules}; import npqwen.__main__; print(*sorted({*sys.modules} - before))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "quant")))}
    command = [sys.executable, "-S", "-c", script]  # without site-packages, which import modules of their own
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["__future__", "npqwen", "npqwen.__main__", "npqwen.errors"], done.stderr


def test_stdout_and_stdin_are_utf8_in_any_locale() -> None:
    command = ["generate", str(TINY), "-", "--max-tokens", "3", "--stop", "é"]
    process = child(*command, stdin=subprocess.PIPE, env=ascii_locale())
    out, errors = process.communicate("\ufeffA café — 東\r\nis\r\n".encode(), timeout=300)
    assert process.returncode == 0, errors
    out.decode()
    # without the mark, the last line's end and the carriage returns
    prompt = len(ReferenceModel.from_directory(TINY).tokenizer.encode("A café — 東\nis"))
    assert f"prompt: {prompt} tokens".encode() in errors


def test_an_argument_is_utf8_in_any_locale_and_so_is_the_text() -> None:
    script = CHILD.replace("npqwen.model.load =", f"{PARROT}\nnpqwen.model.load =")
    script = script.replace("Slow.from_directory", "Parrot.from_directory")
    command = [sys.executable, "-c", script, "0", "generate", str(TINY), "naïve 東京 🎉", "--quiet"]
    done = subprocess.run(command, capture_output=True, env=ascii_locale(), timeout=300)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "naïve 東京 🎉\n", b"")


def test_a_path_that_is_no_utf8_is_written_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    Terminal().text("out\udcff/é\n")
    assert out.getvalue() == b"out\xff/\xc3\xa9\n"


def test_only_a_terminal_gets_the_line_ending_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.BytesIO):
        def isatty(self) -> bool:
            return True

    for out, written in ((io.BytesIO(), b"a\nb\n"), (Screen(), b"a\r\nb\r\n")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, newline="\r\n"))
        Terminal().text("a\nb\n")
        assert out.getvalue() == written


@pytest.mark.skipif(sys.platform == "win32", reason="does not remove a current directory")
def test_a_current_directory_that_was_removed_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.rmdir({str(gone)!r}); from npqwen.commands.cli import main"
    script += f"; main(['convert', {str(TINY)!r}, 'out'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=gone, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "npqwen: error: the current directory does not exist any more; change to another one\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes them")
@pytest.mark.parametrize(
    ("closed", "command", "status"),
    [("<&-", ["chat", "/no/such", "q"], 2), (">&-", ["info", ""], 0), ("2>&-", ["generate", "/no/such", "x"], 2)],
)
def test_stdin_stdout_and_stderr_may_be_closed(
    closed: str, command: list[str], status: int, tiny: Callable[[int], Path]
) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "npqwen"]
    command = [word or str(tiny(4)) for word in command]
    done = subprocess.run([*shell, *command], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_stdin_that_is_not_utf8_is_refused() -> None:
    process = child("generate", str(TINY), "-", stdin=subprocess.PIPE)
    _, errors = process.communicate(b"caf\xe9", timeout=300)
    assert process.returncode == 2
    assert errors.decode().strip() == "npqwen: error: the text on stdin is not UTF-8 (at byte 3)"
