"""Datasets and Serve applications on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="these tests need an environment with npqwen[ray]")

import npqwen  # noqa: E402
import npqwen.ray as on_ray  # noqa: E402

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
QUESTIONS = [f"What is {a} + {a + 8}?" for a in range(10, 26)]
PORT = 8123


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from npqwen_quant import convert

    out = tmp_path_factory.mktemp("model") / "tiny"
    convert(TINY, out, bits=16)
    return out


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    with npqwen.load(model, threads=1) as alone:
        return [alone.chat(question, thinking=False, seed=1).text for question in QUESTIONS]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_a_dataset_is_answered_by_actors(model: Path, expected: list[str]) -> None:
    rows = [{"id": i, "prompt": question} for i, question in enumerate(QUESTIONS)]
    rows.append({"id": len(rows), "prompt": "long " * 3000})
    answered = ray.data.from_items(rows).map_batches(
        on_ray.Generator,
        fn_constructor_kwargs={"model": str(model), "thinking": False, "seed": 1},
        batch_size=6,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    found = sorted(answered.take_all(), key=lambda row: row["id"])
    assert [row["text"] for row in found] == [*expected, ""]
    assert "context" in found[-1]["error"]
    assert all(row["error"] == "" and row["finish_reason"] == "stop" for row in found[:-1])
    assert all(row["prompt_tokens"] > 5 < row["generated_tokens"] for row in found[:-1])


def test_a_prompt_that_is_none_is_an_error_of_its_row(model: Path, expected: list[str]) -> None:
    answer = on_ray.Generator(str(model), threads=1, thinking=False, seed=1)
    prompts = np.array([QUESTIONS[0], None, 3.0, [QUESTIONS[1]], QUESTIONS[2]], dtype=object)
    found = answer({"prompt": prompts})
    assert found["text"].tolist() == [expected[0], "", "", "", expected[2]]
    assert found["error"].tolist() == [
        "",
        "the prompt is None; give text or messages",
        "the prompt is 3.0; give text or messages",
        f"the prompt is {[QUESTIONS[1]]}; give text or messages",
        "",
    ]


def test_messages_and_raw_text(model: Path) -> None:
    with npqwen.load(model, threads=1) as alone:
        said = alone.chat([{"role": "system", "content": "Add."}, {"role": "user", "content": QUESTIONS[0]}], seed=2)
        text = alone.generate("part", seed=2, max_tokens=9).text
    messages = [[{"role": "system", "content": "Add."}, {"role": "user", "content": QUESTIONS[0]}]]
    (row,) = ray.data.from_items([{"messages": one} for one in messages]).map_batches(
        on_ray.Generator, fn_constructor_kwargs={"model": str(model), "column": "messages", "seed": 2}, concurrency=1
    ).take_all()
    assert (row["text"], row["reasoning"]) == (said.text, said.reasoning)
    (row,) = ray.data.from_items([{"prompt": "part"}]).map_batches(
        on_ray.Generator,
        fn_constructor_kwargs={"model": str(model), "chat": False, "seed": 2, "max_tokens": 9},
        concurrency=1,
    ).take_all()
    assert row["text"] == text


def test_vectors(model: Path, tmp_path: Path) -> None:
    embedder = Path(shutil.copytree(model, tmp_path / "embedder"))
    (embedder / "1_Pooling").mkdir()
    (embedder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with npqwen.load(embedder, threads=1) as alone:
        expected = alone.embed(QUESTIONS, dimensions=64)
    rows = [{"id": i, "text": question} for i, question in enumerate(QUESTIONS)]
    found = ray.data.from_items(rows).map_batches(
        on_ray.Embedder,
        fn_constructor_kwargs={"model": str(embedder), "dimensions": 64},
        batch_size=5,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    for row in found.take_all():
        assert (row["embedding"] == expected[row["id"]]).all()


def test_digests_grow_with_the_conversation() -> None:
    def of(**body: Any) -> list[str]:
        return on_ray.prefix_digests(json.dumps(body).encode())

    turn = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A"}]
    first, second = of(messages=turn), of(messages=[*turn, {"role": "assistant", "content": "B"}])
    assert len(first) == 2
    assert second[:2] == first
    assert of(messages=turn, tools=[1])[0] != first[0]
    assert len(of(prompt="x" * 3000)) == 3
    assert of(prompt="x" * 1024 + "a")[0] == of(prompt="x" * 1024 + "b")[0]
    assert of(prompt=7) == on_ray.prefix_digests(b"{") == on_ray.prefix_digests(b"[1]") == []


def post(body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        found: dict[str, Any] = json.load(reply)
        return found


def chat(question: str, system: str | None = None) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    return {"messages": messages, "seed": 1, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[None]:
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(on_ray.application(model, replicas=2, cpus=1))
    yield
    serve.shutdown()


def test_replicas_answer_as_one_model(served: None, expected: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda question: post(chat(question)), QUESTIONS))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == expected


def test_a_stream_comes_in_pieces(served: None, expected: list[str]) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions", json.dumps(chat(QUESTIONS[0]) | {"stream": True}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        lines = [line[6:] for line in reply if line.startswith(b"data: {")]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    assert "".join(pieces) == expected[0]
    assert len(lines) > 5


def test_requests_that_begin_alike_go_to_one_replica(served: None) -> None:
    for name in ("first", "second", "third", "fourth"):
        system = f"This is the {name} of several assistants. " * 60
        usages = [post(chat(question, system))["usage"] for question in QUESTIONS[:4]]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert cached[0] < 100
        assert min(cached[1:]) > 256


def test_a_killed_replica_is_replaced(served: None, expected: list[str]) -> None:
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica:default:npqwen"], capture_output=True, text=True)
    replicas = [int(pid) for pid in found.stdout.split()]
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    deadline, answered = time.monotonic() + 60, 0
    while answered < len(QUESTIONS):
        try:
            said = post(chat(QUESTIONS[answered]))["choices"][0]["message"]["content"]
        except (OSError, ValueError):  # a request that was in the replica is lost, and sent again by its client
            assert time.monotonic() < deadline
            time.sleep(0.2)
            continue
        assert said == expected[answered]
        answered += 1
