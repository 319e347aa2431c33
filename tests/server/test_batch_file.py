"""`npqwen batch`: answers are those of the same requests alone; what is done survives whatever ends the command."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import npqwen
from npqwen import file_lock
from npqwen.commands import cli
from npqwen.errors import OptionError
from npqwen.server.batch_file import BatchInput, BatchOutput

Run = Callable[..., tuple[str, str]]


def request(i: int, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": f"What is {i} + {i + 3}?"}], "seed": i}
    text = {"prompt": f"part {i}", "seed": i}
    return {
        "custom_id": f"request {i}",
        "method": "POST",
        "url": url,
        "body": {"model": "any", "max_tokens": 40, **(chat if "chat" in url else text), **body},
    }


def answer(i: int, status: int = 200) -> dict[str, Any]:
    return {"id": "1", "custom_id": f"request {i}", "response": {"status_code": status, "body": {}}, "error": None}


def write(path: Path, requests: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in requests), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> dict[str, str]:
    """What each request was answered."""
    found = {}
    for one in answers(path):
        (choice,) = one["response"]["body"]["choices"]
        found[one["custom_id"]] = choice["message"]["content"] if "message" in choice else choice["text"]
    return found


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def model(tiny: Callable[[int], Path]) -> Path:
    return tiny(4)


@pytest.mark.parametrize("order", [[], ["--any-order"]])
def test_answers_are_those_of_the_requests_alone(run: Run, model: Path, tmp_path: Path, order: list[str]) -> None:
    chats = [request(i, chat_template_kwargs={"enable_thinking": i % 2 == 0}) for i in range(12)]
    given = write(tmp_path / "in.jsonl", [*chats, *(request(i, "/v1/completions") for i in range(12, 16))])
    run("batch", given, tmp_path / "out.jsonl", "--model", model, "--parallel", 5, *order)
    found = answers(tmp_path / "out.jsonl")
    ids = [one["custom_id"] for one in found]
    assert (sorted(ids) if order else ids) == sorted(ids, key=lambda id: id if order else int(id.split()[1]))
    assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in found)
    assert len({one["id"] for one in found}) == len({one["response"]["request_id"] for one in found}) == 16
    said = texts(tmp_path / "out.jsonl")
    with npqwen.load(model, threads=1) as alone:
        for i in range(12):
            reply = alone.chat(f"What is {i} + {i + 3}?", max_tokens=40, seed=i, thinking=i % 2 == 0)
            assert said[f"request {i}"] == reply.text
        for i in range(12, 16):
            assert said[f"request {i}"] == alone.generate(f"part {i}", max_tokens=40, seed=i).text


def test_a_request_that_fails_is_an_answer_too(run: Run, model: Path, tmp_path: Path) -> None:
    requests = [request(0), request(1, top_p=7), request(2, messages=[]), request(3, stream=True)]
    given = write(tmp_path / "in.jsonl", requests)
    _, err = run("batch", given, tmp_path / "out.jsonl", "--model", model, status=1)
    assert "4 answered" in err
    assert "2 of them with an error" in err
    found = [one["response"] for one in answers(tmp_path / "out.jsonl")]
    assert [one["status_code"] for one in found] == [200, 400, 400, 200]
    assert found[1]["body"]["error"]["param"] == "top_p"


def test_what_is_answered_is_not_answered_again(run: Run, model: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [request(i) for i in range(6)])
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run("batch", given, whole, "--model", model)
    kept = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(kept[0] + kept[3] + kept[5][:40])
    _, err = run("batch", given, part, "--model", model)
    assert "2 of 6 are answered already" in err
    assert part.read_bytes().startswith(kept[0] + kept[3])
    assert [one["custom_id"][-1] for one in answers(part)] == ["0", "3", "1", "2", "4", "5"]
    assert texts(part) == texts(whole)
    before = part.read_bytes()
    run("batch", given, part, "--model", model)
    assert part.read_bytes() == before


def test_a_request_that_failed_is_answered_again(run: Run, model: Path, tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", [request(0, max_tokens=2), request(1)]), tmp_path / "out.jsonl"
    failing = write(tmp_path / "failing.jsonl", [request(0, max_tokens=2, top_p=7), request(1)])
    run("batch", failing, out, "--model", model, status=1)
    kept = out.read_bytes().splitlines()
    _, err = run("batch", failing, out, "--model", model, status=1)
    assert "1 of 2 are answered already" in err
    assert "1 answered" in err
    assert [one["response"]["status_code"] for one in answers(out)] == [400, 200]
    run("batch", given, out, "--model", model)
    assert [(one["custom_id"], one["response"]["status_code"]) for one in answers(out)] == [
        ("request 0", 200),
        ("request 1", 200),
    ]
    assert out.read_bytes().splitlines()[1] == kept[1]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.jsonl"]


def test_the_last_of_several_answers_counts(tmp_path: Path) -> None:
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(i) for i in range(3)])), tmp_path / "out.jsonl"
    refused = {"id": "1", "custom_id": "request 2", "response": None, "error": {"code": "batch_expired"}}
    lines = [answer(1, 500), answer(0), refused, answer(0, 429), answer(1)]
    out.write_text("\n".join(json.dumps(one) for one in lines))  # a kill before answers took the places of errors
    with BatchOutput(out, requests) as output:
        assert output.answered == {"request 1"}
    assert answers(out) == [answer(1), answer(0, 429), refused]
    with BatchOutput(out, requests) as output:
        output.write(answer(2))
        output.write(answer(0))
    assert answers(out) == [answer(1), answer(0), answer(2)]


def test_requests_come_from_stdin_and_answers_go_to_stdout(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = write(tmp_path / "in.jsonl", [request(0), request(1, top_p=7)])
    run("batch", given, "out.jsonl", "--model", model, status=1)
    stdin(monkeypatch, given.read_bytes())
    out, _ = run("batch", "-", "-", "--model", model, status=1)
    said = [json.loads(line)["response"] for line in out.splitlines()]
    assert [one["status_code"] for one in said] == [200, 400]
    assert said[0]["body"]["choices"] == answers(Path("out.jsonl"))[0]["response"]["body"]["choices"]
    stdin(monkeypatch, b"{}\n")
    assert "stdin, line 1 has no custom_id" in run("batch", "-", "-", "--model", model, status=2)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in directories")
def test_requests_come_from_a_pipe(run: Run, model: Path, tmp_path: Path) -> None:
    pipe, text = tmp_path / "pipe", json.dumps(request(0)).encode() + b"\n"
    os.mkfifo(pipe)
    for data, status, message in ((text, 0, "1 answered"), (b"{}\n", 2, f"{pipe}, line 1 has no custom_id")):
        with ThreadPoolExecutor(1) as writer:
            writer.submit(pipe.write_bytes, data)
            assert message in run("batch", pipe, tmp_path / "out.jsonl", "--model", model, status=status)[1]
    assert [one["custom_id"] for one in answers(tmp_path / "out.jsonl")] == ["request 0"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_batch_that_was_ended_is_resumed(model: Path, tmp_path: Path, number: signal.Signals, run: Run) -> None:
    given, out = write(tmp_path / "in.jsonl", [request(i) for i in range(300)]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "npqwen", "batch", str(given), str(out), "--model", str(model), "--parallel", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not out.exists() or out.stat().st_size < 3000:
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        os.kill(child.pid, number)
        _, err = child.communicate(timeout=300)
    assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else cli.INTERRUPTED)
    assert "Traceback" not in err
    kept = out.read_bytes()
    done = kept[: kept.rfind(b"\n") + 1].splitlines()
    assert 0 < len(done) < 300
    left = write(tmp_path / "in.jsonl", [request(i) for i in range(len(done) + 5)])
    run("batch", left, out, "--model", model)
    assert out.read_bytes().splitlines()[: len(done)] == done
    assert [one["custom_id"] for one in answers(out)] == [f"request {i}" for i in range(len(done) + 5)]


LINE = json.dumps(request(0))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no requests"),
        ("\n \n", "has no requests"),
        (f"{LINE}\n{{", "line 2 is not valid JSON"),
        (f"{LINE}\n{LINE.replace('40', 'NaN')}", "line 2 is not valid JSON: it has NaN"),
        (LINE.replace("40", "-Infinity"), "line 1 is not valid JSON: it has -Infinity"),
        (LINE.replace("40", "1e999"), "line 1 has the number 1e999, which is too large"),
        ("[]", "line 1 is []; it must be a JSON object"),
        (f"{LINE}\n\n{LINE}\n", "line 3 repeats the custom_id 'request 0'"),
        ('{"url": "/v1/completions", "body": {}}', "line 1 has no custom_id"),
        (LINE.replace("POST", "GET"), "line 1 has the method 'GET'"),
        (LINE.replace("/v1/chat", "/v2/chat"), "line 1 has the url '/v2/chat/completions'"),
        (LINE.replace('"body"', '"text"'), "line 1 has no body"),
        (LINE.replace('"model": "any", ', ""), "name no model; name it with --model"),
        (LINE, "'any' is neither a directory nor a hub id"),
        ("[" * 100_000, "line 1 is nested too deeply"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, text: str, problem: str
) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text(text)
    _, err = run("batch", given, out, status=2)
    assert problem in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "found",
    [
        '{"custom_id": "another", "response": {"status_code": 200}}\n',
        f"{LINE}\n",
        LINE,
        "A letter to a friend\n",
        "A letter to a friend",
        '{"a": 1}',
        '{"id":"batch_req_',
        '{"id":"batch_req_0f","custom_id":"another","response":{"status_',
    ],
)
def test_a_file_that_is_not_of_these_requests_is_not_touched(
    run: Run, model: Path, tmp_path: Path, found: str
) -> None:
    given, out = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    out.write_text(found)
    _, err = run("batch", given, out, "--model", model, status=2)
    assert "answers none of these requests" in err
    assert out.read_text() == found


@pytest.mark.parametrize("begins", ["{", '{"id":"batch_', '{"id":"batch_req_0f","custom_id":"request 0","resp'])
def test_a_file_does_not_change_before_there_is_an_answer(run: Run, tmp_path: Path, begins: str) -> None:
    given, out = write(tmp_path / "in.jsonl", [request(0), request(1)]), tmp_path / "out.jsonl"
    found = json.dumps(answer(1)) + "\n" + begins
    out.write_text(found)
    assert "neither a directory nor a hub id" in run("batch", given, out, "--model", "none", status=2)[1]
    assert out.read_text() == found
    with BatchOutput(out, BatchInput(given)) as output:
        output.write(answer(0))
    assert answers(out) == [answer(1), answer(0)]


def test_the_first_answer_may_be_incomplete(tmp_path: Path) -> None:
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(0)])), tmp_path / "out.jsonl"
    out.write_text('{"id":"batch_req_0f","custom_id":"request 0","resp')
    with BatchOutput(out, requests) as output:
        assert not output.answered
        output.write(answer(0))
    assert answers(out) == [answer(0)]


def test_the_last_answer_may_lack_its_newline(tmp_path: Path) -> None:
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(0), request(1)])), tmp_path / "out.jsonl"
    out.write_text(json.dumps(answer(0)))
    with BatchOutput(out, requests) as output:
        assert output.answered == {"request 0"}
        output.write(answer(1))
    assert answers(out) == [answer(0), answer(1)]


def test_answers_do_not_replace_requests(run: Run, model: Path, tmp_path: Path) -> None:
    given, link = write(tmp_path / "in.jsonl", [request(0), request(1)]), tmp_path / "link.jsonl"
    link.hardlink_to(given)
    before = given.read_bytes()
    for out in (given, link):
        _, err = run("batch", given, out, "--model", model, status=2)
        assert "INPUT and OUTPUT are the same file" in err
        assert given.read_bytes() == before


def test_files_that_cannot_be_used(run: Run, model: Path, tmp_path: Path) -> None:
    given, of = write(tmp_path / "in.jsonl", [request(0)]), ("--model", model)
    assert "cannot be read" in run("batch", tmp_path / "none", tmp_path / "out", status=2)[1]
    missing = tmp_path / "missing"
    refused = run("batch", given, missing / "out", *of, status=2)[1]
    assert f"the directory {missing} does not exist; create it" in refused
    assert not missing.exists()
    assert f"{tmp_path} is a directory" in run("batch", given, tmp_path, "--model", model, status=2)[1]
    assert "parallel is 0" in run("batch", given, tmp_path / "out", "--parallel", 0, "--model", model, status=2)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such device")
def test_answers_are_not_read_from_a_device(run: Run, model: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [request(0)])
    _, err = run("batch", given, "/dev/full", "--model", model, status=2)
    assert "/dev/full is not a regular file; give the name of a file" in err
    assert err.count("\n") == 1


def test_of_a_large_file_that_is_no_answer_only_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npqwen.server.batch_file.LINE_LIMIT", 1000)
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(0)])), tmp_path / "out.jsonl"
    out.write_bytes(b'{"custom_id": "request 0", "x": "' + bytes(5_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(OptionError, match=r"this line of it answers none of these requests: .*request 0"):
            BatchOutput(out, requests)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert out.stat().st_size > 5_000_000


def test_an_answer_of_ours_may_be_longer_than_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npqwen.server.batch_file.LINE_LIMIT", 1000)
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(0), request(1)])), tmp_path / "out.jsonl"
    long = {**answer(0), "id": "batch_req_0f", "response": {"status_code": 200, "body": {"a": "x" * 3000}}}
    with BatchOutput(out, requests) as output:
        output.write(long)
    out.write_bytes(out.read_bytes() + out.read_bytes().replace(b"request 0", b"request 1")[:2000])
    with BatchOutput(out, requests) as output:
        assert output.answered == {"request 0"}
        output.write(answer(1))
    assert answers(out) == [long, answer(1)]


class WindowsLocks:
    """`msvcrt` for one file: locks of one byte each, at the descriptor's position."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.places: list[int] = []

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in self.places:
            raise OSError(errno.EACCES, "Permission denied")
        self.places.append(place)


def test_two_batches_do_not_write_one_file_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = WindowsLocks()
    monkeypatch.setattr(file_lock, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(file_lock, "msvcrt", locks, raising=False)
    requests, out = BatchInput(write(tmp_path / "in.jsonl", [request(0), request(1)])), tmp_path / "out.jsonl"
    with BatchOutput(out, requests) as output:
        output.write(answer(0))
        with pytest.raises(OptionError, match="is being written by another process"):
            BatchOutput(out, requests)
        output.write(answer(1))
    (place,) = locks.places
    assert place > 10**9  # nothing that another process reads
    assert [one["custom_id"] for one in answers(out)] == ["request 0", "request 1"]


def test_a_chat_batch_gives_what_chats_give(model: Path) -> None:
    questions = [f"What is {i} + {i + 3}?" for i in range(5)]
    with npqwen.load(model, threads=1) as loaded:
        together = loaded.chat_batch(questions, thinking=False, seed=3)
        alone = [loaded.chat(question, thinking=False, seed=3) for question in questions]
        assert [reply.text for reply in together] == [reply.text for reply in alone]
        assert loaded.chat_batch([]) == []
        stopped = loaded.chat_batch([[{"role": "user", "content": "Define anger."}]] * 2, thinking=False, stop="noun")
        assert [reply.stop_string for reply in stopped] == ["noun", "noun"]
        with pytest.raises(npqwen.OptionError, match="conversations must be a list"):
            loaded.chat_batch("Hello")
