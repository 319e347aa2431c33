"""Results of tool calls, as chat templates need them."""

from __future__ import annotations

from collections.abc import Sequence

from npqwen.chat.messages import Message


def matched(messages: Sequence[Message]) -> list[Message]:
    """`messages` with the results of each answer's calls in the order of these calls, and with the tools' names.

    Qwen3's templates write no ids: results are matched to calls by position. Results without an id, or with one that
    matches no call, come after the others, in the order given.
    """
    matched: list[Message] = []
    calls: list[Message] = []
    results: list[Message] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            results.append(message)
            continue
        matched += _in_order(results, calls)
        results = []
        if message is not None:
            matched.append(message)
            calls = message.get("tool_calls", [])
    return matched


def _in_order(results: list[Message], calls: list[Message]) -> list[Message]:
    places = {call["id"]: at for at, call in enumerate(calls) if call.get("id")}
    found = [(places.get(result.get("tool_call_id")), result) for result in results]
    found.sort(key=lambda one: len(calls) if one[0] is None else one[0])
    return [result if at is None else {**result, "name": calls[at]["function"]["name"]} for at, result in found]
