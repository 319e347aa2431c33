"""The generation loop, driven by the NumPy reference model and by a model that recites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference import ReferenceModel

from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.generation.completion import Completion
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.stream import Stream
from npqwen.generation.text import check_options, generate, stream
from npqwen.sampler import Sampling
from npqwen.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-qwen3"
GOLDEN = np.load(ROOT / "tests" / "data" / "tiny-qwen3.npz")
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


class Reciter:
    """A model whose likeliest next token is always the next one of `script`, then eos."""

    def __init__(self, tokenizer: Tokenizer, script: list[int], context: int = 1000) -> None:
        self.tokenizer = tokenizer
        self.script = [*script, 4098]
        self.context = context
        self.path = TINY
        self.config = SimpleNamespace(vocab_size=4128, max_position_embeddings=2048)
        self.generation = GenerationConfig(frozenset({4098}), Sampling(temperature=0))
        self.calls: list[int] = []
        self.seen: list[int] = []

    def new_cache(self, room: int | None = None) -> SimpleNamespace:
        assert room is not None
        assert room <= self.context
        self.room = room
        return SimpleNamespace(length=0, limit=room)

    def forward(self, ids: np.ndarray, cache: SimpleNamespace, out: Any = None) -> np.ndarray:
        assert ids.dtype == np.int32
        self.seen += ids.tolist()
        cache.length += len(ids)
        assert cache.length <= self.room
        logits = np.zeros((1, 4128), np.float32)
        logits[0, self.script[len(self.calls)]] = 1
        self.calls.append(len(ids))
        return logits

    def prefill(self, ids: np.ndarray, cache: SimpleNamespace, progress: Any = None) -> np.ndarray:
        if progress:
            progress(len(ids), len(ids))
        return self.forward(ids, cache)[0]


@pytest.fixture
def recite(model: ReferenceModel) -> Any:
    return lambda text, **options: Reciter(model.tokenizer, model.tokenizer.encode(text), **options)


@pytest.mark.parametrize("k", range(4))
def test_greedy_text_is_that_of_transformers_up_to_eos(model: ReferenceModel, k: int) -> None:
    prompt = model.tokenizer.decode(GOLDEN[f"ids_{k}"], special=True)
    greedy = GOLDEN[f"greedy_{k}"].tolist()
    ends = [i for i, id in enumerate(greedy) if id in (4096, 4098)]
    result = model.generate(prompt, temperature=0, max_tokens=48)
    assert result.ids == greedy[: ends[0] + 1]
    assert result.text == model.tokenizer.decode(greedy[: ends[0]])
    assert result.finish_reason == "stop"


def test_pieces_make_the_text_and_think_marks_are_text(model: ReferenceModel) -> None:
    pieces = list(model.stream(SUM, temperature=0))
    assert "".join(pieces) == "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42"
    assert len(pieces) > 30
    assert all(pieces)


def test_the_checkpoints_own_sampling_is_the_default(model: ReferenceModel) -> None:
    assert model.generation.sampling == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    texts = {model.generate("A river is", seed=seed, max_tokens=8).text for seed in range(6)}
    assert len(texts) > 1
    first, second = (model.generate("A river is", seed=5, max_tokens=8) for _ in range(2))
    assert first.ids == second.ids


def test_max_tokens_ends_with_length(model: ReferenceModel) -> None:
    result = generate(model, SUM, temperature=0, max_tokens=5)
    assert len(result.ids) == 5
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == 20
    assert result.usage.generated_tokens == 5


def test_eos_as_the_last_allowed_token_is_a_stop(recite: Any) -> None:
    result = generate(recite("1 2"), "x", max_tokens=4)  # "1", " ", "2", eos
    assert (result.text, result.finish_reason) == ("1 2", "stop")


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        ("37. 3", "<think>\n17 + 20 = ", "37. 3"),  # across tokens
        (["nowhere", "+ 2", "7 +"], "<think>\n1", "7 +"),  # the first to be complete
        (["= 42 and no more"], "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42", None),
    ],
)
def test_stop_strings(model: ReferenceModel, stop: Any, text: str, found: str | None) -> None:
    pieces = stream(model, SUM, temperature=0, stop=stop)
    assert "".join(pieces) == text
    assert pieces.stop_string == found
    assert pieces.finish_reason == "stop"
    assert model.tokenizer.decode(pieces.ids).startswith(text)


def test_a_stop_string_at_the_limit_is_a_stop_and_held_text_is_let_go(recite: Any) -> None:
    cut = generate(recite("1234"), "x", max_tokens=2, stop="12")
    assert (cut.text, cut.finish_reason) == ("", "stop")
    released = generate(recite("1234"), "x", max_tokens=2, stop="23")
    assert (released.text, released.finish_reason) == ("12", "length")
    at_eos = generate(recite("12"), "x", stop="23")
    assert (at_eos.text, at_eos.finish_reason) == ("12", "stop")


def test_no_half_character_is_ever_emitted(recite: Any) -> None:
    text = "é東🎉"
    assert list(stream(recite(text), "x")) == list(text)
    assert generate(recite("🎉"), "x", max_tokens=1).text == "\ufffd"


def test_the_context_ends_the_text(recite: Any) -> None:
    model = recite("1234567", context=6)
    result = generate(model, "abc")
    prompt = result.usage.prompt_tokens
    assert result.finish_reason == "length"
    assert prompt + len(result.ids) == 6


def test_a_prompt_as_long_as_the_context_is_refused(model: ReferenceModel, recite: Any) -> None:
    with pytest.raises(ContextLengthError, match=r"prompt's 20 tokens .* context of 20; .*longer context"):
        stream(recite("1", context=20), SUM)
    assert generate(recite("1", context=21), SUM).finish_reason == "length"
    with pytest.raises(ContextLengthError, match=r"context of 2048; shorten it$"):
        model.stream("a b " * 2000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"stop": [""]}, "stop has ''"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"top_logprobs": True}, "top_logprobs is True"),
        ({"logits_processor": 3}, "logits_processor is 3, not a function"),
        ({"thinking_budget": -1}, "thinking_budget is -1"),
        ({"thinking_budget": 1.5}, r"thinking_budget is 1\.5"),
        ({"loop_guard": 3}, "loop_guard is 3; it must be True, False or a LoopGuard"),
        ({"logit_bias": {3: "a"}}, r"logit_bias\[3\] is 'a'"),
        ({"logits_procesor": 3}, r"unknown option 'logits_procesor'; did you mean logits_processor\?"),
        ({"max_token": 3}, r"unknown option 'max_token'; did you mean max_tokens\?"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    model: ReferenceModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        stream(model, "x", **options)
    with pytest.raises(OptionError, match=message):
        check_options("x", **options)


def test_a_bias_for_a_token_that_is_not_there_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(OptionError, match="logit_bias has token id 4128; the model's are 0 to 4127"):
        stream(model, "x", logit_bias={4128: 1.0})


def test_an_empty_prompt_is_refused_with_a_hint(model: ReferenceModel) -> None:
    for check in (lambda: stream(model, ""), lambda: check_options("")):
        with pytest.raises(OptionError, match=r"prompt is empty.*give it some text"):
            check()
    with pytest.raises(OptionError, match="bytes, not a string"):
        stream(model, b"x")  # type: ignore[arg-type]


def test_a_foreign_tokenizers_ids_are_refused(model: ReferenceModel) -> None:
    with pytest.raises(CheckpointError, match="token id 4128 but the model has 4128 embeddings"):
        Stream(model, [1, 4128])


def test_embedding_rows_without_a_token_are_never_drawn(model: ReferenceModel, recite: Any) -> None:
    reciter = recite("")
    reciter.script = [4125]  # the likeliest, but there is no such token
    assert generate(reciter, "x", max_tokens=1).ids != [4125]


def test_a_stream_can_be_left_at_any_point(model: ReferenceModel) -> None:
    for taken in range(3):
        pieces = model.stream(SUM, temperature=0)
        text = "".join(next(pieces) for _ in range(taken))
        pieces.close()
        assert list(pieces) == []
        assert pieces.text == text
        assert pieces.finish_reason is None
        with pytest.raises(OptionError, match="closed before its end"):
            pieces.completion()
    assert generate(model, SUM, temperature=0).text.endswith("17 + 25 = 42")


def test_an_interrupt_in_the_model_comes_through_and_keeps_the_text(recite: Any) -> None:
    model = recite("12345")
    forward = model.forward

    def interrupted(ids: np.ndarray, cache: Any, **options: Any) -> np.ndarray:
        if len(model.calls) == 3:
            raise KeyboardInterrupt
        return forward(ids, cache)

    model.forward = interrupted
    pieces = stream(model, "x")
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert pieces.text == "123"
    assert pieces.finish_reason is None


def test_a_cache_with_a_prefix_saves_its_prefill(recite: Any, model: ReferenceModel) -> None:
    ids = GOLDEN["ids_1"].tolist()
    cache = model.new_cache()
    model.prefill(ids[:15], cache)
    with_prefix = Stream(model, ids, temperature=0, cache=cache).completion()
    assert with_prefix.text == generate(model, SUM, temperature=0).text
    assert cache.length == len(ids) + len(with_prefix.ids) - 1

    reciter = recite("12")
    reciter.room = 100
    Stream(reciter, ids, cache=SimpleNamespace(length=15, limit=100)).completion()
    assert reciter.calls[0] == len(ids) - 15
    with pytest.raises(OptionError, match="cache holds 20 tokens, no fewer than the prompt's 20"):
        Stream(reciter, ids, cache=SimpleNamespace(length=20, limit=100))


def test_what_a_processor_raises_comes_through_and_the_cache_stays_a_beginning(model: ReferenceModel) -> None:
    def processor(ids: list[int], logits: np.ndarray) -> None:
        if len(ids) == len(prompt) + 3:
            raise LookupError("mine")

    prompt = model.tokenizer.encode(SUM)
    pieces = Stream(model, prompt, temperature=0, logits_processor=processor)
    with pytest.raises(LookupError, match="mine"):
        list(pieces)
    assert pieces.text == "<think>\n1"
    assert pieces.cache.length == len(prompt) + 3
    assert list(pieces) == []
    assert pieces.finish_reason is None


def test_a_processor_can_write_the_text(model: ReferenceModel) -> None:
    wanted = [*model.tokenizer.encode("Une réponse 🎉"), 4098]

    def processor(ids: list[int], logits: np.ndarray) -> np.ndarray:
        only = np.full_like(logits, -np.inf)
        only[wanted[len(ids) - 1]] = 0
        return only

    prompt = [5]
    result = Stream(model, prompt, logits_processor=processor, seed=1).completion()
    assert (result.text, result.ids, result.finish_reason) == ("Une réponse 🎉", wanted, "stop")


def test_samples_are_what_each_seed_gives_alone(model: ReferenceModel) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.2, "logprobs": True}
    told: list[int] = []
    samples = model.generate("A river is", n=4, seed=7, progress=lambda done, _: told.append(done), **options)
    alone = [model.generate("A river is", seed=7 + i, **options) for i in range(4)]
    assert [sample.ids for sample in samples] == [each.ids for each in alone]
    assert [sample.text for sample in samples] == [each.text for each in alone]
    assert len({sample.text for sample in samples}) > 1
    prompt = alone[0].usage.prompt_tokens
    assert told == [prompt]  # read once
    assert [sample.usage.cached_tokens for sample in samples] == [0, prompt - 1, prompt - 1, prompt - 1]
    unseeded = model.generate("A river is", n=2, max_tokens=8, temperature=1.5, stop=iter(["."]))
    assert unseeded[0].ids != unseeded[1].ids
    assert [len(model.generate("1", n=1, max_tokens=1)), len(model.generate("1", n=2, max_tokens=1))] == [1, 2]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_samples(model: ReferenceModel, n: Any) -> None:
    with pytest.raises(OptionError, match=r"n is .*; it must be a whole number of completions"):
        generate(model, "x", n=n)


def test_forced_tokens_are_text_and_run_in_one_pass(recite: Any) -> None:
    model = recite("12" + "45")
    pieces = stream(model, "x")
    text = next(pieces) + next(pieces)
    forced = model.tokenizer.encode("abé🎉")
    pieces.force(forced[:2])
    pieces.force(forced[2:])
    text += next(pieces)
    assert text == pieces.text == "12abé🎉"
    text += "".join(pieces)
    assert text == "12abé🎉45"
    assert pieces.ids[2:] == [*forced, *model.tokenizer.encode("45"), 4098]
    assert model.calls == [1, 1, 1 + len(forced), 1, 1]  # with the token drawn before them
    assert model.seen == model.tokenizer.encode("x") + pieces.ids[:-1]
    assert pieces.usage.generated_tokens == len(pieces.ids)
    with pytest.raises(OptionError, match="a text that is finished"):
        pieces.force([1])


def test_forced_tokens_can_be_the_first_the_last_and_cut_off(recite: Any) -> None:
    first = stream(recite("1"), "x")
    first.force([*first._model.tokenizer.encode("0"), 4098, 7])  # eos ends it
    assert first.completion().text == "0"
    assert first.ids[-1] == 4098
    limited = stream(recite("1"), "x", max_tokens=3)
    limited.force(limited._model.tokenizer.encode("01234"))
    done = limited.completion()
    assert (done.text, done.finish_reason, len(done.ids)) == ("012", "length", 3)
    stopped = stream(recite("1"), "x", stop="23")
    stopped.force(stopped._model.tokenizer.encode("01234"))
    done = stopped.completion()
    assert (done.text, done.finish_reason, len(done.ids)) == ("01", "stop", 4)
    for id in (-1, 4128):
        with pytest.raises(OptionError, match=f"token id {id} cannot be forced"):
            stream(recite("1"), "x").force([id])


def test_forced_tokens_count_for_penalties(model: ReferenceModel) -> None:
    pieces = stream(model, SUM, temperature=0, presence_penalty=100.0, max_tokens=3)
    think = model.tokenizer.token_id("<think>")
    pieces.force([think])
    assert think not in pieces.completion().ids[1:]


def test_a_watch_sees_every_step_and_can_end_the_text(recite: Any) -> None:
    seen: list[int] = []

    def watch(pieces: Stream) -> None:
        seen.append(len(pieces.ids))
        if len(pieces.ids) == 3:
            pieces.end("loop")

    model = recite("12345")
    done = stream(model, "x", watch=[watch], stop="34").completion()
    assert (done.text, done.finish_reason) == ("123", "loop")  # what was held back for "34" is let go
    assert seen == [0, 1, 2, 3]
    assert stream(recite("12"), "x", watch=[lambda pieces: pieces.end("stop")]).completion().text == ""


def test_the_caller_can_end_the_text_between_pieces(recite: Any) -> None:
    pieces = stream(recite("1234"), "x", stop="23")
    assert next(pieces) == "1"
    pieces.end("length")
    assert pieces.completion().text == "1"
    held = stream(recite("1234"), "x", stop=["14", "12345"], max_tokens=9)
    held.force(held._model.tokenizer.encode("0123"))
    assert next(held) == "0"
    held.end("stop")
    assert list(held) == ["123"]
    assert (held.text, held.stop_string) == ("0123", None)


def test_a_special_tokens_name_stops_at_that_token(recite: Any) -> None:
    """It is hidden from the text, so it could not be found there."""
    model = recite("12<|im_start|>34")
    pieces = stream(model, "x", stop=["<|im_start|>", "nowhere", "29"])
    done = pieces.completion()
    assert (done.text, done.finish_reason, pieces.stop_string) == ("12", "stop", "<|im_start|>")
    assert stream(recite("1</think>2"), "x", stop="</think>").completion().text == "1"  # not special: text
    inside = stream(recite("12<|im_start|>34"), "x", stop="im_start").completion()
    assert inside.text == "1234"


@pytest.mark.parametrize("stop", ["🎉", "\u0301", "é", "🎉é", "\u200d👩"])
def test_stop_strings_of_characters_that_many_tokens_make(recite: Any, stop: str) -> None:
    text = "a🎈b🎉é c👩\u200d👩 q\u0301 end"
    pieces = stream(recite(text), "x", stop=stop)
    assert pieces.completion().text == text[: text.index(stop)]
    assert pieces.stop_string == stop


def test_usage_counts_the_models_time_and_not_the_callers(
    recite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("npqwen.generation.stream.time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = recite("1234")
    forward = model.forward

    def slow(ids: np.ndarray, cache: Any, **options: Any) -> np.ndarray:
        clock.now += 0.5 * len(ids)
        return forward(ids, cache)

    model.forward = slow
    pieces = stream(model, "1 + 1")
    for _ in pieces:
        clock.now += 100  # the caller takes its time
    usage = pieces.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (4, 5)
    assert usage.prefill_seconds == usage.first_token_seconds == 2.0
    assert usage.decode_seconds == 2.0
    assert usage.prefill_rate == 2.0
    assert usage.decode_rate == 2.0


def test_progress_is_told_of_the_prompt(model: ReferenceModel) -> None:
    told: list[tuple[int, int]] = []
    generate(model, "a " * 100, max_tokens=1, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] >= 100
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def write_generation(tmp_path: Path, generation: dict | None, eos: Any = 7) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.mark.parametrize(
    ("generation", "eos_ids", "sampling"),
    [
        (None, {7}, Sampling(0.6, 20, 0.95)),
        ({}, {7}, Sampling(0.0, 50)),
        ({"eos_token_id": 3}, {3}, Sampling(0.0, 50)),
        ({"eos_token_id": [3, 4], "do_sample": True}, {3, 4}, Sampling(1.0, 50)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {7}, Sampling(0.0, 20)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": None, "repetition_penalty": 1.05},
            {7},
            Sampling(0.7, 50, 0.8, repetition_penalty=1.05),
        ),
    ],
)
def test_generation_config(tmp_path: Path, generation: Any, eos_ids: set[int], sampling: Sampling) -> None:
    found = GenerationConfig.from_directory(write_generation(tmp_path, generation))
    assert found == GenerationConfig(frozenset(eos_ids), sampling)


@pytest.mark.parametrize(
    "generation", [{"eos_token_id": "x"}, {"eos_token_id": [1, None]}, {"do_sample": True, "top_p": 7}]
)
def test_a_bad_generation_config_is_named(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: (eos_token_id|top_p) is"):
        GenerationConfig.from_directory(write_generation(tmp_path, generation))


def test_a_model_without_eos_runs_to_its_limit(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"eos_token_id": None}))
    model = ReferenceModel.from_directory(tmp_path)
    result = model.generate(SUM, temperature=0, max_tokens=48)
    assert isinstance(result, Completion)
    assert result.ids == GOLDEN["greedy_1"].tolist()
    assert "<|im_end|>" not in result.text
