"""Hybrids in conversations: a recurrent state cannot be cut back, and yet no prompt is read again as a whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import npqwen
from npqwen.engine.prefix_page import MIN_PREFIX
from npqwen.errors import FormatError
from npqwen.format.safetensors import make_header, read_header
from npqwen.generation.message_starts import message_starts
from npqwen.model import Model

TURNS = 20


@pytest.fixture(scope="module")
def path(hybrid: Callable[[str, int], Path]) -> Path:
    return hybrid("qwen35", 4)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with npqwen.load(path, threads=1, prefix_memory=0) as model:
        yield model


class Talk:
    """A conversation whose answers think first; thoughts are left out of later prompts, as Qwen3's templates do."""

    def __init__(self, model: Model, seed: int) -> None:
        self.random = random.Random(seed)
        token = model.tokenizer.token_id
        self.start, self.end, self.think, self.answer = (
            token(name) or 0 for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
        )
        self.history = self.message(self.words(60))

    def words(self, count: int) -> list[int]:
        return [self.random.randrange(300, 4000) for _ in range(count)]

    def message(self, content: list[int]) -> list[int]:
        return [self.start, 350, 351, *content, self.end, 352]

    def prompt(self) -> list[int]:
        self.history += self.message(self.words(self.random.randrange(3, 40)))
        return [*self.history, self.start, 360, 361, self.think]

    def answered(self, ids: list[int]) -> list[int]:
        """Keep the last tokens of an answer, the others are thoughts; the message that later prompts have of it."""
        message = [self.start, 360, 361, *ids[-12:], self.end, 352]
        self.history += message
        return message


@pytest.mark.parametrize("kept", ["session", "pool", "disk"])
def test_a_conversation_with_thinking_reads_at_most_the_last_answer_again(
    path: Path, plain: Model, kept: str, tmp_path: Path
) -> None:
    options: Any = {"max_tokens": 30, "temperature": 1.0}
    cache = tmp_path if kept == "disk" else None
    model = npqwen.load(path, threads=1, prefix_cache=cache, prefix_memory=0 if kept == "session" else None)
    session = npqwen.Session(model)
    talk = Talk(model, 1)
    before: list[int] = []
    computed = 0
    for turn in range(TURNS):
        prompt = talk.prompt()
        if kept == "disk":  # every turn is a run of its own
            model.close()
            model = npqwen.load(path, threads=1, prefix_cache=cache)
        stream = session.stream(prompt, seed=turn, **options) if kept == "session" else None
        found = model.generate(prompt, seed=turn, **options) if stream is None else stream.completion()
        assert found.ids == plain.generate(prompt, seed=turn, **options).ids
        again = len(prompt) - found.usage.cached_tokens
        if turn:
            new = len(prompt) - len(before)  # the answer as it is kept, and the next question
            assert again <= new + MIN_PREFIX, (turn, again, new)
        computed += again
        before = prompt
        talk.answered(found.ids)
    model.close()
    # Every token once, and the few at the beginning of each answer twice.
    assert computed <= len(before) + MIN_PREFIX * TURNS


def test_a_common_beginning_is_read_once(path: Path, plain: Model) -> None:
    with npqwen.load(path, threads=1) as model:
        talk = Talk(model, 2)
        system = talk.message(talk.words(500))
        for seed in range(5):
            prompt = [*system, *Talk(model, seed).message(talk.words(20)), talk.start, 360, 361]
            found = model.generate(prompt, max_tokens=5, temperature=0)
            assert found.usage.cached_tokens >= (len(system) if seed else 0)
            assert found.ids == plain.generate(prompt, max_tokens=5, temperature=0).ids


def test_a_batch_shares_a_beginning(path: Path, plain: Model) -> None:
    with npqwen.load(path, threads=1) as model:
        talk = Talk(model, 3)
        system = talk.message(talk.words(300))
        prompts = [[*system, *talk.message(talk.words(10 + n)), talk.start, 360] for n in range(6)]
        found = model.generate(prompts, max_tokens=20, temperature=0)
        assert sum(one.usage.cached_tokens for one in found) >= 5 * len(system)
        assert [one.ids for one in found] == [plain.generate(p, max_tokens=20, temperature=0).ids for p in prompts]


def test_files_of_prefixes_are_replaced_only_if_they_lack_a_state(path: Path, tmp_path: Path) -> None:
    def files() -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in tmp_path.glob("*.safetensors")}

    prompt: list[int] = []
    found = []
    for count in (300, 0, 100):  # a long prompt, the same again, and a longer one that marks other positions
        with npqwen.load(path, threads=1, prefix_cache=tmp_path) as model:
            prompt += Talk(model, 7).message([1000 + n for n in range(count)]) if count else []
            model.generate(prompt, max_tokens=2, temperature=0)
        found.append(files())
    first, again, longer = found
    assert first
    assert again == first
    assert len(longer) >= len(first)
    with npqwen.load(path, threads=1, prefix_cache=tmp_path) as model:
        assert model.generate(prompt, max_tokens=2, temperature=0).usage.cached_tokens > 300


def test_a_saved_session_goes_back_to_the_last_message(path: Path, plain: Model, tmp_path: Path) -> None:
    with npqwen.load(path, threads=1, prefix_memory=0) as model:
        talk = Talk(model, 4)
        session = npqwen.Session(model)
        for turn in range(3):
            answer = session.stream(talk.prompt(), max_tokens=30, seed=turn).completion()
            talk.answered(answer.ids)
        session.save(tmp_path / "session")
        loaded = npqwen.Session.load(model, tmp_path / "session")
        assert loaded.ids == session.ids
        prompt = talk.prompt()
        found = loaded.stream(prompt, max_tokens=10, temperature=0).completion()
        assert len(prompt) - found.usage.cached_tokens < 80
        assert found.ids == plain.generate(prompt, max_tokens=10, temperature=0).ids


@pytest.mark.parametrize("position", [0, 301, 9_999_999_999])
def test_a_saved_state_at_no_position_of_the_text_is_refused(path: Path, tmp_path: Path, position: int) -> None:
    saved = tmp_path / "session"
    with npqwen.load(path, threads=1) as model:
        session = npqwen.Session(model)
        session.prefill(list(range(300)))
        session.save(saved)
        with open(saved, "rb") as file:
            header = read_header(file)
            data = file.read()
        tensors = [(name, each.dtype, each.shape) for name, each in header.tensors.items()]
        assert [name for name, *_ in tensors if name.startswith("state.")] == ["state.256", "state.288", "state.300"]
        tensors = [(name.replace("256", str(position)), *rest) for name, *rest in tensors]  # type: ignore[misc]
        saved.write_bytes(make_header(tensors, header.metadata) + data)
        with pytest.raises(FormatError, match="truncated or not a saved session"):
            npqwen.Session.load(model, saved)


def test_borders_are_few_and_the_nearest_are_among_them(plain: Model) -> None:
    start = plain.tokenizer.token_id("<|im_start|>")
    assert start is not None
    ids = [start if at % 50 == 0 else 1000 for at in range(10_000)]
    starts = message_starts(ids, plain.tokenizer)
    assert starts[0] == 50
    assert starts[-3:] == [9850, 9900, 9950]
    assert len(starts) < 24
    assert message_starts([1000] * 1000, plain.tokenizer) == [992]
    assert message_starts([1000] * 10, plain.tokenizer) == []
