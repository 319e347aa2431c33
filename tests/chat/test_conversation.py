"""Conversations: what is kept, what is read again, and what happens when there is too much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reciter import TOKENIZER, Reciter

import npqwen
from npqwen.chat.events import Notice, Reasoning, Text
from npqwen.chat.window import Window, shown
from npqwen.engine.prefix_page import common_prefix
from npqwen.errors import ContextLengthError, OptionError
from npqwen.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
GREEDY: dict[str, Any] = {"temperature": 0}
THOUGHT = "<think>\nHm, {}.\n</think>\n\nIt is {}."
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def look() -> str:
    """Look."""
    return "nothing"


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# --- reuse ---


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_computes_only_what_is_new_and_answers_as_a_fresh_start_does(model: Model, thinking: bool) -> None:
    talk = model.conversation(thinking=thinking, **GREEDY)
    read: list[int] = []
    for question in ("What is 17 + 25?", "Define river.", "What is 30 + 12?", "What is 11 + 31?"):
        prompt = model.tokenizer.encode(model.render([*talk.messages, user(question)], None, thinking))
        model.prefixes.clear()
        reply = talk.send(question)
        model.prefixes.clear()
        assert reply.text == model.chat(talk.messages[:-1], thinking=thinking, **GREEDY).text
        assert reply.usage.prompt_tokens == len(prompt)
        assert reply.usage.cached_tokens == min(common_prefix(read, prompt), len(prompt) - 1)
        read = talk._session.ids[: talk.tokens]
    # All but the last answer and the question: the template removes reasoning, or its empty tags, from earlier turns.
    assert reply.usage.prompt_tokens - reply.usage.cached_tokens < 45
    assert reply.usage.prompt_tokens > 100


def test_a_fork_is_independent_and_shares_what_was_computed(model: Model) -> None:
    talk = model.conversation(thinking=False, **GREEDY)
    talk.send("What is 17 + 25?")
    fork = talk.fork()
    other = fork.send("What is 30 + 12?")
    reply = talk.send("What is 11 + 31?")
    assert other.usage.cached_tokens > 0
    assert reply.usage.cached_tokens > 0
    assert (other.text, reply.text) == ("30 + 12 = 42", "11 + 31 = 42")
    assert [m["content"] for m in fork.messages[:2]] == [m["content"] for m in talk.messages[:2]]
    assert fork.messages[2] != talk.messages[2]


def test_retry_and_undo(model: Model) -> None:
    talk = model.conversation("Be brief.", thinking=False, **GREEDY)
    first = talk.send("What is 17 + 25?")
    before = talk.messages
    again = talk.retry()
    assert again.text == first.text
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert talk.messages == before
    assert talk.retry(max_tokens=2).finish_reason == "length"
    assert talk.undo() == "What is 17 + 25?"
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(OptionError, match="the conversation has no user message yet"):
        talk.undo()
    with pytest.raises(OptionError, match="the conversation has no user message yet"):
        talk.retry()


def test_options_of_a_turn_hold_for_that_turn_only() -> None:
    model = Reciter("<think>\n\n</think>\n\nYes.", "No.", CALL, "Nothing.")
    talk = model.conversation(thinking=True)
    talk.send("a")
    talk.send("b", thinking=False)
    assert model.prompts[0].endswith("assistant\n")
    assert model.prompts[1].endswith("</think>\n\n")
    assert talk.send("c", tools=[look], run_tools=True).text == "Nothing."
    assert "<tools>" in model.prompts[2]
    assert talk._settings.tools is None
    with pytest.raises(OptionError, match="unknown option 'temprature'"):
        talk.send("d", temprature=1)  # type: ignore[call-arg]
    assert len(talk.messages) == 8


def test_a_conversations_messages_can_be_changed_only_by_its_methods() -> None:
    talk = Reciter("Yes.").conversation(messages=[user("a"), {"role": "assistant", "content": "b"}])
    talk.messages.clear()
    assert len(talk.messages) == 2
    talk.send("c")
    assert [m["content"] for m in talk.messages] == ["a", "b", "c", "Yes."]


def test_the_system_message_can_be_changed() -> None:
    model = Reciter("Yes.", "No.", "So.")
    talk = model.conversation("Be brief.")
    talk.send("a")
    talk.system = "Be long."
    talk.send("b")
    talk.system = None
    talk.send("c")
    assert [prompt.split("<|im_end|>")[0] for prompt in model.prompts] == [
        "<|im_start|>system\nBe brief.",
        "<|im_start|>system\nBe long.",
        "<|im_start|>user\na",
    ]
    assert talk.system is None
    talk.system = "x"
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "x"}]


def test_results_of_tools_that_the_caller_ran_are_added_and_answered() -> None:
    model = Reciter(CALL, "Nothing.")
    talk = model.conversation(tools=[{"name": "look"}], thinking=False)
    call = talk.send("What is there?").tool_calls[0]
    talk.add({"role": "tool", "tool_call_id": call.id, "content": "dust"})
    assert talk.send().text == "Nothing."
    assert "<tool_response>\ndust\n</tool_response>" in model.prompts[1]
    assert [m["role"] for m in talk.messages] == ["user", "assistant", "tool", "assistant"]
    with pytest.raises(OptionError, match="the conversation is empty"):
        Reciter().conversation().send()


# --- leaving early ---


def leave_at(stream: Any, kind: type) -> None:
    for event in stream:
        if isinstance(event, kind):
            stream.close()
            return
    raise AssertionError


def test_an_answer_that_is_closed_in_its_text_keeps_that_text() -> None:
    model = Reciter("Yes, it is.", "Go on.")
    talk = model.conversation(thinking=False)
    stream = talk.stream("Is it?")
    leave_at(stream, Text)
    assert talk.messages == [user("Is it?"), {"role": "assistant", "content": stream.text}]
    assert talk.send("So?").text == "Go on."
    assert model.prompts[1].startswith(
        f"<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n{stream.text}<|im_end|>"
    )


def test_a_turn_that_is_closed_before_its_text_is_undone() -> None:
    model = Reciter(THOUGHT.format(1, 1), THOUGHT.format(2, 2), THOUGHT.format(3, 3))
    talk = model.conversation()
    leave_at(talk.stream("Is it?"), Reasoning)
    assert talk.messages == []
    talk.send("Is it?")
    before = talk.messages
    leave_at(talk.stream_retry(), Reasoning)
    assert talk.messages == before


def test_a_new_turn_closes_an_answer_that_is_still_streaming() -> None:
    talk = Reciter("One two three.", "Yes.").conversation(thinking=False)
    stream = talk.stream("Count.")
    next(stream)
    begun = stream.text
    talk.send("Stop.")
    assert [m["content"] for m in talk.messages] == ["Count.", begun, "Stop.", "Yes."]
    assert list(stream) == []
    unread = talk.stream("never begun")
    assert talk.undo() == "Stop."
    assert list(unread) == []


def test_an_interrupt_in_the_model_leaves_the_conversation_usable() -> None:
    model = Reciter("One two three.", "One two three.")
    talk = model.conversation(thinking=False)
    forward, count = model.forward, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return forward(*args, **options)

    model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        talk.send("Count.")
    assert talk.messages[0] == user("Count.")
    assert "One two three.".startswith(talk.messages[1]["content"])
    assert talk.retry().text == "One two three."


def test_a_tool_may_read_the_conversation_but_not_continue_it() -> None:
    seen: list[Any] = []

    def peek() -> str:
        """Peek."""
        seen.append([message["role"] for message in talk.messages])
        return talk.send("Me first.").text

    talk = Reciter('<tool_call>{"name": "peek"}</tool_call>', "Well.").conversation(
        tools=[peek], run_tools=True, thinking=False
    )
    reply = talk.send("?")
    assert seen == [["user", "assistant"]]
    assert "the conversation is generating an answer; fork it" in reply.tool_results[0].content
    assert reply.text == "Well."


# --- overflow ---


def length(prompt: str) -> int:
    return len(TOKENIZER.encode(prompt))


def test_overflow_drops_the_oldest_turns_as_a_whole_with_a_notice_and_keeps_the_system_message() -> None:
    model = Reciter(*["Yes, and more."] * 40, context=300)
    talk = model.conversation("Be brief.", thinking=False)
    notices, tokens = [], []
    for turn in range(40):
        reply = talk.send(f"Question {turn} of many.")
        notices.append(reply.notices)
        tokens.append(length(model.prompts[-1]))
        assert reply.text == "Yes, and more."
        assert model.prompts[-1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion ")
        assert f"Question {turn} of many." in model.prompts[-1]
        # Whole turns, and all of them from the oldest shown to the newest.
        first = int(model.prompts[-1].split("Question ")[1].split()[0])
        assert model.prompts[-1].count("<|im_start|>user") == turn - first + 1
        assert talk.dropped == 2 * first
    assert max(tokens) <= 300 - 300 // 4
    shown = [lines for lines in notices if lines]
    assert 2 < len(shown) < 10  # not every turn: what stays must be read anew each time
    assert shown[0][0].startswith("the conversation exceeds the context of 300 tokens: its oldest ")
    assert len(talk.messages) == 81
    assert [message["content"] for message in talk.messages[1:3]] == ["Question 0 of many.", "Yes, and more."]


def test_overflow_is_an_event_before_the_answer() -> None:
    talk = Reciter(*["Yes."] * 30, context=150).conversation(thinking=False)
    for turn in range(30):
        events = list(talk.stream(f"Question {turn} of many."))
        if talk.dropped:
            assert isinstance(events[0], Notice)
            return
    raise AssertionError


def test_a_message_that_is_too_long_by_itself_is_refused_and_not_kept() -> None:
    talk = Reciter("Yes.", "No.", context=120).conversation("Be brief.", thinking=False)
    talk.send("Short?")
    before = talk.messages
    with pytest.raises(ContextLengthError, match=r"message is too long: .* takes \d+ tokens, and the context is 120"):
        talk.send("1 " * 100)
    assert talk.messages == before
    assert talk.send("Short?").text == "No."


def test_a_tools_result_that_overflows_drops_old_turns_and_is_never_cut() -> None:
    def read(size: int) -> str:
        """Read."""
        return "1 " * size

    def call(size: int) -> str:
        return f'<tool_call>{{"name": "read", "arguments": {{"size": {size}}}}}</tool_call>'

    model = Reciter("Yes.", "Yes.", call(50), "Read.", call(500), "End.", context=600)
    talk = model.conversation(tools=[read], run_tools=True, thinking=False)
    for turn in range(2):
        talk.send("long " * 40 + str(turn))
    assert talk.send("Read!").text == "Read."
    assert "1 " * 50 in model.prompts[3]
    assert talk.dropped > 0
    with pytest.raises(ContextLengthError, match="this turn is too long"):
        talk.send("Read more!")
    assert talk.messages[-1]["role"] == "tool"  # it was run; what comes next can do without it
    assert talk.send("Never mind.").text == "End."


def test_turns_can_be_undone_after_an_overflow() -> None:
    talk = Reciter(*["Yes."] * 30, context=150).conversation(thinking=False)
    while not talk.dropped:
        talk.send("Question of many.")
    while talk.messages:
        talk.undo()
        assert talk.dropped <= len(talk.messages)
    assert talk.send("Again?").text == "Yes."
    talk.clear()
    assert talk.dropped == 0


@pytest.mark.parametrize("max_tokens", [None, 10, 5000])
def test_the_window_leaves_room_and_drops_no_more_than_necessary(max_tokens: int | None) -> None:
    def encode(messages: list[dict[str, Any]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    messages = [{"role": "system", "content": "s" * 10}]
    messages += [{"role": role, "content": "x" * 10} for _ in range(20) for role in ("user", "assistant")]
    messages += [user("?")]
    window = Window(encode, 400, max_tokens)
    room = min(max_tokens or 1024, 100)
    ids, dropped = window.fit(messages, 0)
    assert dropped % 2 == 0
    assert len(ids) == len(encode(shown(messages, dropped)))
    assert len(ids) + room <= 300  # three quarters
    assert len(ids) + room + 20 > 300
    assert window.fit(messages, dropped) == (ids, dropped)
    assert Window(encode, 4000, max_tokens).fit(messages, 0)[1] == 0


@pytest.mark.parametrize(("system", "takes"), [(None, "too long: it takes"), ("Be brief.", "with the system message")])
def test_a_message_that_is_too_long(system: str | None, takes: str) -> None:
    talk = Reciter("Yes.", context=64).conversation(system)
    with pytest.raises(ContextLengthError, match=rf"{takes} .*is 64; .*longer context \(--context, --yarn\)"):
        talk.send("word " * 100)


def test_thinking_is_refused_at_once_by_a_model_without_the_switch() -> None:
    talk = Reciter(template="thinking-2507").conversation()
    with pytest.raises(OptionError, match="always thinks"):
        talk.thinking = False
    assert talk.thinking is None
