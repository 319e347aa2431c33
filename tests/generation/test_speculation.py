"""Draft tokens: the text is the one without them, whatever the options; the cache holds it, whatever ends it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from random_texts import PROMPTS, RandomTexts, outcome
from reciter import EOS, GREEDY, Reciter

from npqwen.chat.events import Finish
from npqwen.engine.pass_times import PassTimes
from npqwen.engine.piece import Piece
from npqwen.generation.batch import Batch
from npqwen.generation.drafting import Drafting
from npqwen.generation.generate import generate
from npqwen.generation.session import Session
from npqwen.generation.speculation import PASS, Speculation
from npqwen.generation.stream import Stream
from npqwen.generation.text_drafter import KEY, TextDrafter
from npqwen.model import Model

PERIOD = list(range(100, 120))

def naive(ids: Sequence[int]) -> list[int]:
    """Where the longest end of ids occurred before: the indices after those occurrences, the newest first."""
    for length in range(len(ids) - 1, KEY - 1, -1):
        end = list(ids[-length:])
        found = [at for at in range(len(ids) - 1, length - 1, -1) if list(ids[at - length : at]) == end]
        if found:
            return found
    return []


def test_the_drafter_continues_the_longest_earlier_occurrence_of_the_texts_end() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(200):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(0, 12))]
        text = [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
        drafter = TextDrafter(prompt)
        for i, id in enumerate(text):
            drafter.extend([id])
            ids = prompt + text[: i + 1]
            found, draft = naive(ids), drafter.propose(4)
            assert (draft is None) == (not found)
            if draft is not None:
                period = len(ids) - found[0]
                assert draft.ids == [ids[found[0] + at % period] for at in range(4)]
                hits += 1
    assert hits > 100


def test_a_surer_draft_follows_a_longer_repetition() -> None:
    short, long = TextDrafter([1, 2, 3, 4, 5, 6, 7, 9, 5, 6, 7]), TextDrafter([*PERIOD, 1, 2, *PERIOD])
    assert short.propose(2) == ([9, 5], 2)
    found = long.propose(5)
    assert found is not None
    assert found.ids == [1, 2, *PERIOD[:3]]
    assert found.certainty > 2


def test_a_draft_ends_where_another_text_begins() -> None:
    found = TextDrafter([1, 2, 3, 4, -1, 5, 1, 2, 3]).propose(4)
    assert found is not None
    assert found.ids == [4]
    assert TextDrafter([1, 2, 3, -1, 1, 2, 3]).propose(4) is None


def test_passes_are_measured_and_those_between_are_estimated() -> None:
    passes = PassTimes(sparse=False)
    assert passes.seconds[1] == 1
    assert passes.seconds[4] < 1.2 < PassTimes(sparse=True).seconds[4]
    passes.add(1, 0.010)
    passes.add(5, 0.020)
    passes.add(300, 9.0)
    assert passes.seconds[1] == 0.010
    assert passes.seconds[3] == pytest.approx(0.015)
    assert passes.seconds[16] > 0.020
    for _ in range(32):
        passes.add(1, 100.0)  # something else takes the machine: it counts as twice the usual time
    assert passes.seconds[1] < 0.010 * (1 + 1 / 8) ** 33


def test_a_pass_takes_no_longer_than_one_of_more_tokens_and_old_measurements_are_forgotten() -> None:
    passes = PassTimes(sparse=False)
    passes.add(1, 0.010)
    passes.add(2, 0.100)
    passes.add(3, 0.012)
    passes.add(3, 0.012)
    assert passes.seconds[2] == passes.seconds[3] == pytest.approx(0.012)
    passes = PassTimes(sparse=False)
    passes.add(1, 0.010)
    passes.add(8, 0.100)  # while the machine was busy
    for _ in range(1000):
        passes.add(1, 0.010)
    assert passes.seconds[8] < 0.016


@pytest.mark.parametrize("two", [1.1, 2.0])
def test_drafts_get_longer_as_they_are_accepted_and_stop_when_they_do_not_pay(two: float) -> None:
    times = PassTimes(sparse=False)
    times.add(1, 1.0)
    times.add(2, two)
    times.add(15, two * 1.5)
    text = [*PERIOD * 4]
    speculation = Speculation(Drafting(times), text)
    lengths = []
    for _ in range(25):
        draft = speculation.propose([], PASS, 1)
        lengths.append(len(draft))
        speculation.learn(0, bool(draft))
    assert lengths[0] > 4
    assert lengths[-1] == 0
    tries = 0
    for _ in range(400):
        draft = speculation.propose([], PASS, 1)
        tries += bool(draft)
        speculation.learn(0, bool(draft))
    assert 0 < tries < 60  # it tries again some time, but rarely
    for _ in range(400):
        draft = speculation.propose([], PASS, 1)
        speculation.learn(len(draft), False)
    assert len(draft) == PASS - 1


def test_always_drafts_wherever_there_is_an_idea() -> None:
    times = PassTimes(sparse=False)
    times.add(1, 1.0)
    times.add(2, 10.0)
    times.add(15, 150.0)
    speculation = Speculation(Drafting(times), PERIOD * 2, always=True)
    assert speculation.propose([], PASS, 1) == PERIOD[:1]
    assert speculation.propose([], 0, 1) == []
    assert speculation.propose([], PASS, PASS) == []


def recite(*texts: list[int]) -> Reciter:
    return Reciter(*texts, sampling=GREEDY)


def test_a_repetition_takes_few_passes() -> None:
    model = recite(PERIOD * 4)
    done = generate(model, [1, *PERIOD], speculation=True)
    assert done.ids == [*PERIOD * 4, EOS]
    assert max(model.calls[1:]) == PASS
    assert len(model.calls) < 20
    assert sum(model.calls) - 21 == 80 + done.usage.drafted_tokens - done.usage.accepted_tokens
    assert done.usage.accepted_tokens > 65
    plain = recite(PERIOD * 4)
    assert generate(plain, [1, *PERIOD], speculation=False).usage.drafted_tokens == 0
    assert set(plain.calls[1:]) == {1}


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    for most in range(1, 24):
        model = recite(PERIOD * 4)
        done = generate(model, [1, *PERIOD * 2], speculation=True, max_tokens=most)
        assert done.ids == (PERIOD * 4)[:most]
        assert done.finish_reason == "length"
        assert done.usage.drafted_tokens <= most - 1


@pytest.mark.parametrize("bits", [4, 16])
def test_two_hundred_texts_are_the_same_with_and_without_draft_tokens(bits: int, tiny: Any) -> None:
    import npqwen

    structured = pytest.importorskip("llguidance", reason="structures need it") is not None
    drafted = accepted = 0
    with npqwen.load(tiny(bits), threads=1) as model:
        draw = RandomTexts(bits, model.tokenizer, structured)
        for round in range(100):
            prompt, options = draw.random.choice(PROMPTS), draw.one()
            plain = outcome(Stream(model, prompt, speculation=False, **options, **draw.functions(round)))
            for wanted in (True, None):
                stream = Stream(model, prompt, speculation=wanted, **options, **draw.functions(round))
                assert outcome(stream) == plain, (round, options)
                drafted, accepted = drafted + stream.usage.drafted_tokens, accepted + stream.usage.accepted_tokens
    assert 300 < accepted < drafted


def test_texts_of_a_batch_are_the_same_with_and_without_draft_tokens(tiny_model: Model) -> None:
    draw = RandomTexts(7, tiny_model.tokenizer, False)
    drafted = 0
    for _ in range(12):
        many = [(draw.random.choice(PROMPTS), draw.one()) for _ in range(draw.random.randrange(2, 7))]
        alone = [
            outcome(Stream(tiny_model, prompt, speculation=False, **options, **draw.functions(at)))[:5]
            for at, (prompt, options) in enumerate(many)
        ]
        batch = Batch(tiny_model)
        streams = [
            Stream(tiny_model, prompt, batch=batch, speculation=at % 3 != 2 or None, **options, **draw.functions(at))
            for at, (prompt, options) in enumerate(many)
        ]
        assert [outcome(stream)[:5] for stream in streams] == alone
        drafted += batch.statistics.drafted_tokens
        assert batch.statistics.accepted_tokens == sum(stream.usage.accepted_tokens for stream in streams)
    assert drafted > 100


class Counting(Reciter):
    """Counts the tokens of each pass over several sequences."""

    def forward_pieces(self, pieces: Sequence[Piece], out: Any = None, maxima: Any = None) -> list[Any]:
        self.passes_run = [*getattr(self, "passes_run", []), sum(piece.ids.size for piece in pieces)]
        return super().forward_pieces(pieces, out, maxima)


def test_passes_of_a_batch_are_no_longer_than_promised() -> None:
    model = Counting(*[PERIOD * 4] * 4, sampling=GREEDY)
    batch = Batch(model)
    streams = [Stream(model, [id, *PERIOD * 2], batch=batch, speculation=True) for id in range(1, 5)]
    assert [stream.completion().ids for stream in streams] == [[*PERIOD * 4, EOS]] * 4
    assert all(stream.usage.accepted_tokens > 30 for stream in streams)
    assert model.passes_run[0] == 4 * 41
    assert max(model.passes_run[1:]) == PASS
    many = recite(*[[5, 6, 7] * 6] * PASS)
    batch = Batch(many)
    streams = [Stream(many, [id, *[5, 6, 7] * 3], batch=batch, speculation=True) for id in range(100, 100 + PASS)]
    assert [stream.completion().ids for stream in streams] == [[*[5, 6, 7] * 6, EOS]] * PASS
    assert batch.statistics.drafted_tokens == 0  # the pass is full with one token of each


def test_a_draft_takes_no_memory_from_other_texts(tiny_model: Model) -> None:
    page = tiny_model.new_cache(1).page_bytes
    ids = tiny_model.tokenizer.encode(PROMPTS[2]) * 30
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}}
    prompt = ids[:250]
    batch = Batch(tiny_model, memory=3 * page)
    streams = [Stream(tiny_model, each, batch=batch, speculation=True, **options) for each in (prompt, prompt[1:])]
    plain = [generate(tiny_model, each, speculation=False, **options).ids for each in (prompt, prompt[1:])]
    assert [stream.completion().ids for stream in streams] == plain


@pytest.fixture
def repeating(tiny_model: Model) -> tuple[list[int], dict[str, Any]]:
    """A prompt and options with which most draft tokens are right, but not all."""
    options = {"temperature": 0.7, "seed": 5, "max_tokens": 80, "logit_bias": {4098: -1e9, 4096: -1e9}}
    return tiny_model.tokenizer.encode(PROMPTS[2]), options


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 14, 23, 40])
def test_a_session_continues_after_a_text_that_was_closed_amid_a_draft(
    steps: int, tiny_model: Model, repeating: tuple[list[int], dict[str, Any]]
) -> None:
    prompt, options = repeating
    session = Session(tiny_model)
    stream = session.stream(prompt, speculation=True, **options)
    while len(stream.ids) < steps:
        next(stream)
        assert session.cache.length == len(session.ids) - 1
    fork = session.fork()
    stream.close()
    assert session.cache.length == len(session.ids) - 1
    more = {**options, "seed": 9, "max_tokens": 20}
    fresh = generate(tiny_model, session.ids, speculation=False, **more)
    assert session.continue_(speculation=True, **more).completion().ids == fresh.ids
    assert fork.continue_(speculation=True, **more).completion().ids == fresh.ids
    logits = tiny_model.forward(session.ids[session.cache.length :], session.cache)
    assert np.array_equal(logits[0], tiny_model.logits(session.ids)[-1])


def test_tokens_forced_between_pieces_end_the_draft(
    tiny_model: Model, repeating: tuple[list[int], dict[str, Any]]
) -> None:
    prompt, options = repeating
    forced = tiny_model.tokenizer.encode(" 14 + 37 = 51.")

    def text(speculation: bool) -> tuple[list[int], str]:
        stream = Stream(tiny_model, prompt, speculation=speculation, **options)
        for at, _ in enumerate(stream):
            if at in (2, 9, 10, 21):
                stream.force(forced)
        return stream.ids, stream.text

    assert text(True) == text(False)


def test_an_error_of_a_processor_amid_a_draft_leaves_a_prefix(tiny_model: Model) -> None:
    prompt = tiny_model.tokenizer.encode(PROMPTS[2])
    calls: list[int] = []

    def fails(ids: list[int], logits: Any) -> None:
        calls.append(len(ids))
        if len(calls) == 9:
            raise RuntimeError("enough")

    session = Session(tiny_model)
    stream = session.stream(prompt, speculation=True, temperature=0, logits_processor=fails)
    with pytest.raises(RuntimeError, match="enough"):
        stream.completion()
    assert stream.usage.drafted_tokens
    assert len(session.ids) == len(prompt) + 8
    assert session.cache.length <= len(session.ids)
    assert session.continue_(temperature=0, max_tokens=5).completion().ids == (
        generate(tiny_model, session.ids[: len(prompt) + 8], temperature=0, max_tokens=5, speculation=False).ids
    )


def interrupted(model: Model, at: int) -> Iterator[None]:
    """Have the pass number `at` raise KeyboardInterrupt once it has run, as Ctrl-C does between two instructions."""
    forward, calls = model.forward_pieces, 0

    def interrupting(*args: Any) -> Any:
        nonlocal calls
        found = forward(*args)
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward_pieces", interrupting)
        yield


@pytest.mark.parametrize("batched", [False, True])
def test_ctrl_c_after_a_pass_with_a_draft_leaves_a_prefix(
    batched: bool, tiny_model: Model, repeating: tuple[list[int], dict[str, Any]]
) -> None:
    prompt, options = repeating
    session = Session(tiny_model)
    batch = Batch(tiny_model) if batched else None
    stream = session.stream(prompt, batch=batch, speculation=True, **options)
    for _ in interrupted(tiny_model, 2):
        with pytest.raises(KeyboardInterrupt):
            stream.completion()
    assert session.cache.length <= len(session.ids)
    logits = tiny_model.forward(session.ids[-1:], truncated(session))
    assert np.array_equal(logits[0], tiny_model.logits(session.ids)[-1])


def truncated(session: Session) -> Any:
    """A fork of the session's cache without its last token."""
    return session.cache.fork(len(session.ids) - 1)


def test_turns_of_a_conversation_are_the_same(tiny_model: Model) -> None:
    def turns(speculation: bool) -> list[str]:
        chat = tiny_model.conversation(seed=3, speculation=speculation, max_tokens=60)
        texts = []
        for question in ("Define anger.", "Define anger.", "14 + 37 =", "Define anger."):
            reply = chat.send(question)
            texts.append(reply.reasoning + "|" + reply.text)
        return texts

    assert turns(True) == turns(False)


def test_an_answers_usage_counts_draft_tokens(tiny_model: Model) -> None:
    events = tiny_model.stream_chat("14 + 37 =", seed=1, speculation=True)
    finish = [event for event in events if isinstance(event, Finish)][-1]
    usage = finish.reply.usage
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    assert usage.accepted_tokens < usage.generated_tokens


def test_automatic_needs_a_model_that_knows_what_its_passes_cost() -> None:
    assert generate(recite(PERIOD * 2), [1, *PERIOD]).usage.drafted_tokens == 0
    model = recite(PERIOD * 2)
    model.drafting = Drafting(PassTimes(sparse=False))
    assert generate(model, [1, *PERIOD]).usage.accepted_tokens > 20


def test_a_mixture_is_drafted_only_where_it_is_sure() -> None:
    drafted = {}
    for sparse in (False, True):
        for name, text in (("short", [5, 6, 7, 8, 9, 5, 6, 7, 10, 11]), ("long", PERIOD * 3)):
            model = recite(text)
            model.drafting = Drafting(PassTimes(sparse=sparse))
            drafted[name, sparse] = generate(model, [1]).usage.drafted_tokens
    assert drafted["short", True] == 0 < drafted["short", False]  # three tokens that repeat are not sure enough
    assert drafted["long", True] > 20
