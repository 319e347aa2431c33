"""The examples do what they say, on the small model, each in a process of its own as a user starts it."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from reciter import Reciter
from retrieval_checkpoints import embedding_checkpoint

import npqwen

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTION = {"role": "user", "content": "What is 17 + 25?"}


def run(name: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(EXAMPLES / name), *args],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "argv", [name])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_generate() -> None:
    assert run("generate.py").stdout.startswith("river (noun): a large natural stream of water")


def test_logits() -> None:
    winter = run("logits.py").stdout
    assert winter.splitlines()[0].endswith("%  ' year'")
    assert "perplexity of the text: " in winter
    one_token = run("logits.py", str(EXAMPLES / "tiny-qwen3"), "a")
    assert one_token.stdout.count("%") == 10
    assert "perplexity" not in one_token.stdout  # a single token predicts nothing in the text
    assert "Warning" not in one_token.stderr


def test_qwen3_in_numpy() -> None:
    assert run("qwen3_in_numpy.py").stdout == "river (noun): a large natural stream of water (larger than a creek).\n"


def test_threads() -> None:
    lines = run("threads.py", str(EXAMPLES / "tiny-qwen3"), "river", "winter").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["river", "winter"]


def test_chat() -> None:
    done = run("chat.py", stdin="What is 17 + 25?\nDefine river.\n\n")
    assert "17 + 25 = 42" in done.stdout
    assert "river (noun): a large natural stream of water" in done.stdout
    assert "think>" not in done.stdout
    assert done.stderr.count("tokens/s]") == 2


def test_chat_ends_dimmed_reasoning_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, beside = Screen(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", beside)
        app = module("chat", patch)
        patch.setattr(npqwen, "load", lambda *args, **options: nullcontext(Reciter("<think>\nHm", "Yes.")))
        questions = ["a", "b", ""]
        patch.setattr(app, "read_line", lambda: questions.pop(0))
        app.main()
    assert screen.getvalue() == "\x1b[2mHm\x1b[0m\nYes.\x1b[0m\n"
    assert "\x1b" not in beside.getvalue()


def test_tools() -> None:
    assert run("tools.py").stdout.splitlines() == [
        "calls get_weather(city='Paris')",
        'result: {"city": "Paris", "degrees": 17, "sky": "sunny"}',
        "It is 17 degrees and sunny in Paris.",
    ]
    assert (
        'result: {"error": "LookupError: no station in Oslo"}'
        in run("tools.py", str(EXAMPLES / "tiny-qwen3"), "What is the weather in Oslo?").stdout
    )


def test_structured() -> None:
    defined, called, text, parsed = run("structured.py").stdout.splitlines()
    assert defined == "river (noun)"
    assert called == "[('get_weather', {'city': 'Paris'})]"
    report = json.loads(text)
    forecast = ", ".join(f"{day}={report['forecast'][day]!r}" for day in ("today", "tomorrow"))
    assert parsed == f"Report(city={report['city']!r}, forecast=Forecast({forecast}))"


def test_thinking_budget() -> None:
    done = run("thinking_budget.py")
    whole, short, none = done.stdout.split("--- ")[1:]
    assert whole == "no limit\nreasoning: 17 + 20 = 37. 37 + 5 = 42.\nanswer: 17 + 25 = 42\n"
    ending = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
    assert short.startswith(f"12 tokens\nreasoning: 17 + 20 = 37.\n\n{ending}\nanswer: ")
    assert none.startswith(f"0 tokens\nreasoning: {ending}\nanswer: ")
    assert "The small model was never taught what" in done.stderr


def test_labels() -> None:
    lines = [line.partition(": ") for line in run("labels.py").stdout.splitlines()]
    assert [(word, ranked.split()[0]) for word, _, ranked in lines] == [
        ("river", "noun"),
        ("beautiful", "adjective"),
        ("quickly", "adverb"),
        ("write", "verb"),
    ]
    assert all(len(ranked.split(", ")) == 4 for _, _, ranked in lines)


def test_search(tmp_path: Path) -> None:
    """The small model's vectors mean little, but the same text always has the same one."""
    model = embedding_checkpoint(tmp_path / "model")
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("python.md", "models.md"):
        (folder / name).write_bytes((EXAMPLES.parent / "docs" / name).read_bytes())
    first = run("search.py", "Which models can search?", str(folder), str(model))
    count = int(re.search(r"(\d+) passages, \1 of them new", first.stderr)[1])  # type: ignore[index]
    assert count > 30
    lines = first.stdout.splitlines()
    assert [line.split()[1] in ("python.md:", "models.md:") for line in lines] == [True] * 3
    assert lines == sorted(lines, reverse=True)
    with (folder / "models.md").open("a", encoding="utf-8") as file:
        file.write("\n\nA passage that is new.\n")
    again = run("search.py", "Which models can search?", str(folder), str(model))
    assert 1 <= int(re.search(r"(\d+) of them new", again.stderr)[1]) <= 2  # type: ignore[index]
    assert again.stdout.splitlines()[0] == lines[0]


def test_session() -> None:
    lines = run("session.py").stdout.splitlines()
    assert lines[0].startswith("1231 tokens computed in ")
    assert "MB, and loaded in " in lines[1]
    assert lines[2] == "Define river. river (noun): a large natural stream of water (larger than a creek)."
    assert lines[4] == "What is 17 + 25? 17 + 25 = 42"
    for cost in lines[3::2]:
        cached, computed = (int(number) for number in re.findall(r"\d+", cost))
        assert cached >= 1231
        assert computed < 30


def test_asyncio_app() -> None:
    done = run("asyncio_app.py")
    assert done.stdout.splitlines()[0::2] == ["What is 17 + 25? 17 + 25 = 42", "What is 30 + 12? 30 + 12 = 42"]
    assert "the event loop was blocked" in done.stderr


@pytest.fixture
def server() -> Iterator[str]:
    command = [sys.executable, str(EXAMPLES / "web_handler.py"), str(EXAMPLES / "tiny-qwen3"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.kill()


def post(url: str, body: Any) -> list[dict[str, Any]]:
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as response:
        lines = [line.decode().strip() for line in response]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_web_handler(server: str) -> None:
    asked = {"messages": [QUESTION], "thinking": True, "seed": 1}
    answers: list[list[dict[str, Any]]] = []
    clients = [threading.Thread(target=lambda: answers.append(post(server, asked))) for _ in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(answers) == 3
    for events in answers:
        assert "".join(event.get("text", "") for event in events) == "17 + 25 = 42"
        assert "".join(event.get("reasoning", "") for event in events).endswith("= 42.")
        assert len([event for event in events if "text" in event]) > 5  # piece by piece
        assert events[-1]["finish_reason"] == "stop"
        assert events[-1]["messages"][0]["content"] == "17 + 25 = 42"
    wrong_bodies: list[Any] = [[], {}, {"messages": []}]
    wrong_bodies += [{"messages": [QUESTION], "cache": 1}, {"messages": [QUESTION], "seed": -1}]
    for wrong in wrong_bodies:
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            post(server, wrong)
        refused.value.close()
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        post(server.replace("/chat", "/other"), asked)
    refused.value.close()


def test_leaving_an_asyncio_answer_ends_it_and_errors_come_through() -> None:
    class Slow(Reciter):
        def forward(self, *args: Any, **options: Any) -> Any:
            time.sleep(0.001)
            return super().forward(*args, **options)

    async def leave() -> None:
        stream = Slow("word " * 500).stream_chat("?", thinking=False)
        async with stream:
            async for _ in stream:
                break
        assert stream.reply is None
        assert list(stream) == []

    async def cancel() -> None:
        stream = Slow("word " * 500).stream_chat("?", thinking=False)

        async def read() -> None:
            async with stream:
                async for _ in stream:
                    pass

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 0.05)
        assert stream.reply is None
        assert list(stream) == []

    async def fail() -> None:
        model = Reciter("word " * 50)
        stream = model.stream_chat("?", thinking=False)
        model.forward = None  # type: ignore[assignment, method-assign]
        with pytest.raises(TypeError):
            async for _ in stream:
                pass

    asyncio.run(leave())
    asyncio.run(cancel())
    asyncio.run(fail())


def test_the_loop_of_an_asyncio_program_is_never_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    app = module("asyncio_app", monkeypatch)
    loop: Any = None

    class Patient(Reciter):
        """Begins an answer, and every token of it, only when the loop has come round."""

        def stream_chat(self, *args: Any, **options: Any) -> npqwen.ChatStream:
            self._wait()
            return super().stream_chat(*args, **options)

        def forward(self, *args: Any, **options: Any) -> Any:
            self._wait()
            return super().forward(*args, **options)

        def _wait(self) -> None:
            came_round = threading.Event()
            loop.call_soon_threadsafe(came_round.set)
            assert came_round.wait(60), "the loop is blocked"

    async def answer() -> str:
        nonlocal loop
        loop = asyncio.get_running_loop()
        return str(await app.answer(Patient("It is 42."), "Which?"))

    assert asyncio.run(answer()) == "Which? It is 42."
