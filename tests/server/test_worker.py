"""The engine's thread: requests in company, in a queue, cancelled, failing, and at the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from reciter import GREEDY, Reciter
from scripted import Held
from serving import wait_until

import npqwen
from npqwen.chat.events import CallStart, Finish, Notice, Reasoning, Text
from npqwen.engine.prefix_page import MIN_PREFIX
from npqwen.errors import ClosedError, ContextLengthError, OptionError, QueueFullError
from npqwen.server.openai.prompts_run import PromptsRun
from npqwen.server.requests import ChatRequest, TextRequest
from npqwen.server.run import Completed, Progress, Run, Scored
from npqwen.server.worker import Worker
from npqwen.tools.calls import ToolCall

Result = TypeVar("Result")
QUESTIONS = [f"What is {a} + {b}?" for a, b in [(17, 25), (3, 4), (60, 12), (9, 9), (31, 8), (5, 70), (44, 1), (2, 2)]]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@contextmanager
def working(model: Any, **options: Any) -> Iterator[Worker]:
    worker = Worker(model, **options)
    try:
        yield worker
    finally:
        worker.close()


def run(body: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(body, 60))


async def events(run: Run) -> list[Any]:
    found: list[Any] = []
    await run.for_each(lambda index, event: found.append(event))
    return found


def test_answers_of_many_requests_at_once_are_those_of_each_alone(tiny_model: npqwen.Model) -> None:
    """Different prompts, samplings and kinds of requests; nothing of one gets into another."""
    options: list[Any] = [{"seed": i, "temperature": 0.1 + 0.2 * i, "logprobs": i % 2 == 0} for i in range(8)]
    chats = [ChatRequest(user(text), given) for text, given in zip(QUESTIONS, options, strict=True)]
    texts = [TextRequest(text * 9, {"seed": 3, "temperature": 1.0, "max_tokens": 20}, n=2) for text in QUESTIONS[:3]]

    async def all_at_once(worker: Worker) -> tuple[list[Any], list[Any]]:
        requests: list[ChatRequest | TextRequest] = [*chats, *texts]
        runs = [await worker.start(request) for request in requests]
        replies = await asyncio.gather(*(run.replies() for run in runs[: len(chats)]))
        completions = await asyncio.gather(*(run.completions() for run in runs[len(chats) :]))
        return list(replies), list(completions)

    with working(tiny_model) as worker:
        replies, completions = run(all_at_once(worker))
        done = worker.statistics
    for (reply,), text, given in zip(replies, QUESTIONS, options, strict=True):
        alone = tiny_model.chat(text, **given)
        assert (reply.text, reply.reasoning, reply.logprobs) == (alone.text, alone.reasoning, alone.logprobs)
        assert reply.messages == alone.messages
    for two, request in zip(completions, texts, strict=True):
        alone_two = tiny_model.generate(request.prompt, n=2, **request.options)
        assert [each.ids for each in two] == [each.ids for each in alone_two]
    assert (done.requests, done.running, done.waiting) == (len(chats) + len(texts), 0, 0)
    generated = sum(reply.usage.generated_tokens for (reply,) in replies)
    assert done.generated_tokens == generated + sum(len(each.ids) for two in completions for each in two)
    assert done.cached_tokens > 0


def test_events_come_in_their_order() -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with working(Reciter(f"<think>\nHm.\n</think>\n\nSo. {call}")) as worker:

        async def body() -> list[Any]:
            return await events(await worker.start(ChatRequest(user("?"), {"tools": [tool], "logprobs": True})))

        found = run(body())
    assert isinstance(found[0], Progress)
    assert found[0].done == found[0].total > 0
    kinds = [type(event) for event in found if not isinstance(event, Scored)]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind is not before][:3] == [
        Progress,
        Reasoning,
        Text,
    ]
    assert CallStart in kinds
    assert kinds[-2:] == [ToolCall, Finish]
    scored = [token.id for event in found if isinstance(event, Scored) for token in event.tokens]
    assert [token.id for token in found[-1].reply.logprobs] == scored


def test_a_notice_comes_first() -> None:
    with working(Reciter("<think>\nHm.\n</think>\n\nYes.", sampling=GREEDY)) as worker:

        async def body() -> list[Any]:
            return await events(await worker.start(ChatRequest(user("?"))))

        found = [event for event in run(body()) if not isinstance(event, Progress)]
    assert isinstance(found[0], Notice)
    assert found[-1].reply.notices == [found[0].text]


def test_a_stop_string_ends_the_answer_and_its_computation() -> None:
    model = Reciter("<think>\nabc\n</think>\n\nOne abc two" + " and so on" * 50)
    with working(model) as worker:

        async def body() -> Any:
            return (await (await worker.start(ChatRequest(user("?"), {"stop": ["abc"]}))).replies())[0]

        reply = run(body())
        wait_until(lambda: not worker.statistics.running)
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("abc", "One ", "stop")
    assert sum(model.calls) < 100


@pytest.mark.parametrize("at", [None, 3])
def test_a_cancelled_request_leaves_within_a_pass(at: int | None) -> None:
    """In its prompt, which is in progress, and while its text is written."""
    model = Held("one two three four five six", "yes", at=at)

    async def body(worker: Worker) -> list[Any]:
        first = await worker.start(TextRequest("a b c"))
        reading = asyncio.create_task(events(first))
        second = await worker.start(TextRequest("d e f"))
        await asyncio.sleep(0.05)
        first.cancel()
        model.go.set()
        await second.completions()
        return await reading

    with working(model, parallel=1) as worker:
        found = run(body(worker))
        wait_until(lambda: not worker.statistics.running)
    assert not any(isinstance(event, Completed) for event in found)
    assert model.calls.index(3, 1) <= (at or 0) + 2  # passes before the second one's prompt


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model = Held("yes", "yes", "yes", "yes")

    async def body(worker: Worker) -> list[Any]:
        running = await worker.start(TextRequest("a"))
        await asyncio.to_thread(wait_until, lambda: worker.statistics.running)
        waiting = [await worker.start(TextRequest("b")) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting already") as error:
            await worker.start(TextRequest("c"))
        assert 1 <= error.value.retry_after <= 60
        waiting.pop().cancel()
        model.go.set()
        done = [await run.completions() for run in (running, *waiting)]
        return [*done, await (await worker.start(TextRequest("c"))).completions()]

    with working(model, parallel=1, queue_limit=2) as worker:
        assert [one.text for (one,) in run(body(worker))] == ["yes"] * 3


def test_a_request_waits_once_whatever_its_choices_and_prompts(tiny_model: npqwen.Model) -> None:
    async def body(worker: Worker) -> None:
        many = [TextRequest(f"{i} a", n=8, options={"max_tokens": 2}) for i in range(40)]
        prompts = await PromptsRun.start(worker, many)
        single = [await worker.start(TextRequest("b", n=16, options={"max_tokens": 2})) for _ in range(3)]
        assert len(await prompts.completions()) == 320
        for run in single:
            assert len(await run.completions()) == 16
        assert worker.statistics.waiting == 0

    with working(tiny_model, queue_limit=4) as worker:
        run(body(worker))


def test_what_cannot_be_obeyed_is_refused_at_the_door(tiny_model: npqwen.Model) -> None:
    refused: list[tuple[Any, type[Exception]]] = [
        (TextRequest(""), OptionError),
        (TextRequest("a", {"top_p": 7}), OptionError),
        (TextRequest("a", n=0), OptionError),
        (TextRequest("one two " * 5000), ContextLengthError),
        (ChatRequest([{"role": "nobody", "content": "x"}]), OptionError),
        (ChatRequest(user("x"), {"template_options": {"tools": 1}}), OptionError),
    ]
    with working(tiny_model) as worker:

        async def body() -> None:
            for request, error in refused:
                with pytest.raises(error):
                    await worker.start(request)

        run(body())
        assert (worker.statistics.waiting, worker.statistics.requests) == (0, 0)


def test_an_engine_that_fails_ends_its_requests_and_serves_the_next(
    tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: Worker) -> None:
        with monkeypatch.context() as patch:

            def fails(*args: Any) -> None:
                raise RuntimeError("the engine broke")

            patch.setattr(tiny_model, "forward_pieces", fails)
            runs = [await worker.start(TextRequest(text, n=2)) for text in QUESTIONS[:3]]
            for each in runs:
                with pytest.raises(RuntimeError, match="the engine broke"):
                    await each.completions()
        (again,) = await (await worker.start(TextRequest("One", {"max_tokens": 3}))).completions()
        assert again.ids

    with working(tiny_model) as worker:
        run(body(worker))
        assert worker.statistics.alive
    assert "the engine of tiny-qwen3-16 failed" in caplog.text


def test_one_choice_that_fails_ends_its_request_only(tiny_model: npqwen.Model) -> None:
    def fails(ids: list[int], logits: Any) -> None:
        raise ValueError("mine")

    async def body(worker: Worker) -> None:
        wrong = await worker.start(TextRequest("One", {"logits_processor": fails}, n=3))
        right = await worker.start(TextRequest("One", {"max_tokens": 3}))
        with pytest.raises(ValueError, match="mine"):
            await events(wrong)
        assert await right.completions()

    with working(tiny_model) as worker:
        run(body(worker))
        wait_until(lambda: not worker.statistics.running)


def test_closing_ends_all_requests() -> None:
    model = Held("yes", "yes")

    async def body(worker: Worker) -> None:
        runs = [await worker.start(TextRequest("a")) for _ in range(2)]
        await asyncio.to_thread(wait_until, lambda: worker.statistics.running)
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        await asyncio.sleep(0.02)
        model.go.set()
        for each in runs:
            with pytest.raises(ClosedError):
                await each.completions()
        await closing
        with pytest.raises(ClosedError):
            await worker.start(TextRequest("a"))

    worker = Worker(model, parallel=1)  # type: ignore[arg-type]
    run(body(worker))
    assert not worker.statistics.alive
    assert not any(thread.name == "npqwen-engine-m" for thread in threading.enumerate())


def test_a_request_that_meets_the_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late: when it has just been checked that the worker is open, or the engine has just looked for calls."""

    async def started(worker: Worker) -> None:
        with pytest.raises(ClosedError):
            await asyncio.wait_for((await worker.start(TextRequest("a"))).completions(), 10)

    def closes(*args: Any) -> Run:
        worker.close()
        return Run(*args)

    worker = Worker(Reciter("yes"))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr("npqwen.server.worker.Run", closes)
        run(started(worker))

    worker = Worker(Reciter("yes"))  # type: ignore[arg-type]
    looked, go, take = threading.Event(), threading.Event(), worker._take_calls

    def pauses(wait: bool) -> None:
        take(wait)
        looked.set()
        assert go.wait(10)

    async def body() -> None:
        begun = await worker.start(TextRequest("a"))
        closing = threading.Thread(target=worker.close)
        closing.start()
        await asyncio.to_thread(wait_until, lambda: worker._closed)
        go.set()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(begun.completions(), 10)
        await asyncio.to_thread(closing.join)

    monkeypatch.setattr(worker, "_take_calls", pauses)
    while not looked.wait(0.01):
        worker.limit(0)  # wakes the engine
    run(body())


def test_the_heartbeat_is_the_engines() -> None:
    model = Held("yes")
    with working(model) as worker:
        time.sleep(0.05)
        assert time.monotonic() - worker.statistics.heartbeat < 0.05  # idle, and well

        async def body() -> None:
            begun = await worker.start(TextRequest("a"))
            await asyncio.to_thread(wait_until, lambda: worker.statistics.running)
            beat = worker.statistics.heartbeat
            await asyncio.sleep(0.05)
            assert worker.statistics.heartbeat == beat  # it hangs in a pass
            model.go.set()
            await begun.completions()
            assert worker.statistics.heartbeat > beat

        run(body())


def test_a_next_turn_reads_only_what_is_new_and_a_changed_one_from_where_it_differs(tiny_model: npqwen.Model) -> None:
    """Whatever was asked in between, and however early the prompts part."""
    told = [*user("Here is a list: " + ", ".join(map(str, range(60)))), {"role": "assistant", "content": "Yes."}]

    async def body(worker: Worker) -> list[tuple[int, int]]:
        seen = []
        for messages in (
            [*told, *user("What is 3 + 4?")],
            user("Something else, which shares nothing but the beginning of a turn"),
            [*told, *user("What is 3 + 4?"), {"role": "assistant", "content": "3 + 4 = 7"}, *user("And 1 + 1?")],
            [*told, *user("What is 5 + 6?")],
            [*told[:1], {"role": "assistant", "content": "No."}, *user("What is 3 + 4?")],
        ):
            (reply,) = await (await worker.start(ChatRequest(messages, {"max_tokens": 4, "seed": 1}))).replies()
            seen.append((reply.usage.prompt_tokens, reply.usage.cached_tokens))
        return seen

    with working(tiny_model) as worker:
        first, other, next_turn, another, fork = run(body(worker))
    assert first[1] == other[1] == 0
    assert next_turn[1] >= first[0] - 4 - MIN_PREFIX  # all of it but the beginning of the answer
    assert another[1] >= first[0] - 20
    assert first[0] - 40 <= fork[1] < another[1]


def test_a_restarted_server_finds_what_the_last_one_computed(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    told = [{"role": "system", "content": "You answer in few words. " * 40}]

    async def body(worker: Worker, question: str) -> int:
        run = await worker.start(ChatRequest([*told, *user(question)], {"max_tokens": 4, "seed": 1}))
        (reply,) = await run.replies()
        assert worker.statistics.cached_tokens == reply.usage.cached_tokens
        return reply.usage.cached_tokens

    cached = []
    for question in ("What is 3 + 4?", "Who are you?"):
        with npqwen.load(tiny(4), threads=1, prefix_cache=tmp_path) as model:
            known = len(model.tokenizer.encode(told[0]["content"]))
            with working(model) as worker:
                cached.append(run(body(worker, question)))
    assert cached[0] == 0
    assert cached[1] >= known
