"""The generation loop, driven by the NumPy reference model and by a model that recites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from reciter import Reciter, recite
from reference import ReferenceModel

from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.generation.completion import Completion
from npqwen.generation.decoding import check_prompt
from npqwen.generation.generate import generate, stream
from npqwen.generation.options import check_options
from npqwen.generation.sampling import Sampling
from npqwen.generation.stream import Stream

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"
GOLDEN = np.load(ROOT / "tests" / "data" / "tiny-qwen3.npz")
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


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
    assert model.generation_config.sampling == Sampling(temperature=0.6, top_k=20, top_p=0.95)
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


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    result = generate(recite("1 2"), "x", max_tokens=4)  # "1", " ", "2", eos
    assert (result.text, result.finish_reason) == ("1 2", "stop")


def test_no_half_character_is_ever_emitted() -> None:
    text = "é東🎉"
    assert list(stream(recite(text), "x")) == list(text)
    assert generate(recite("🎉"), "x", max_tokens=1).text == "\ufffd"


def test_the_context_ends_the_text() -> None:
    model = recite("1234567", context=6)
    result = generate(model, "abc")
    prompt = result.usage.prompt_tokens
    assert result.finish_reason == "length"
    assert prompt + len(result.ids) == 6


def test_a_prompt_as_long_as_the_context_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(ContextLengthError, match=r"takes 20 tokens, and the context is 20; .*longer context"):
        stream(recite("1", context=20), SUM)
    assert generate(recite("1", context=21), SUM).finish_reason == "length"
    with pytest.raises(ContextLengthError, match=r"takes 4,001 tokens, and the context is 2,048"):
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
        check_options(options)


def test_a_bias_for_a_token_that_is_not_there_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(OptionError, match="logit_bias has token id 4128; the model's are 0 to 4127"):
        stream(model, "x", logit_bias={4128: 1.0})


def test_an_empty_prompt_is_refused_with_a_hint(model: ReferenceModel) -> None:
    for check in (lambda: stream(model, ""), lambda: check_prompt("")):
        with pytest.raises(OptionError, match=r"prompt is empty.*give it some text"):
            check()
    with pytest.raises(OptionError, match="the prompt is b'x'; give text or token ids"):
        stream(model, b"x")


def test_ids_that_the_model_does_not_have_are_refused(model: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="the prompt has token id 4128; the model's are 0 to 4127"):
        Stream(model, [1, 4128])
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, limit=None: [1, 4128])
    with pytest.raises(CheckpointError, match=r"token id 4128 but the model has 4128 embeddings; is .*tokenizer\.json"):
        Stream(model, "x")


def test_embedding_rows_without_a_token_are_never_drawn(model: ReferenceModel) -> None:
    reciter = recite([4125])  # the likeliest, but there is no such token
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


def test_an_interrupt_in_the_model_propagates_and_keeps_the_text() -> None:
    class Interrupted(Reciter):
        def forward(self, *args: Any, **options: Any) -> NDArray[np.float32]:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().forward(*args, **options)

    pieces = stream(Interrupted("12345", sampling=Sampling(temperature=0)), "x")
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert pieces.text == "123"
    assert pieces.finish_reason is None


def test_a_cache_with_a_prefix_saves_its_prefill(model: ReferenceModel) -> None:
    ids = GOLDEN["ids_1"].tolist()
    cache = model.new_cache()
    model.prefill(ids[:15], cache)
    with_prefix = Stream(model, ids, temperature=0, cache=cache).completion()
    assert with_prefix.text == generate(model, SUM, temperature=0).text
    assert cache.length == len(ids) + len(with_prefix.ids) - 1

    reciter = recite("12")
    room = reciter.new_cache(100)
    room.length = 15
    Stream(reciter, ids, cache=room).completion()
    assert reciter.calls[0] == len(ids) - 15
    room.length = 20
    with pytest.raises(OptionError, match="cache holds 20 tokens; it must hold fewer than the prompt's 20"):
        Stream(reciter, ids, cache=room)


def test_exceptions_of_a_processor_propagate_and_the_cache_stays_a_prefix(model: ReferenceModel) -> None:
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
    text = "A river is a long way of water. " * 4
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.2, "logprobs": True}
    reports: list[int] = []
    samples = model.generate(text, n=4, seed=7, progress=lambda done, _: reports.append(done), **options)
    alone = [model.generate(text, seed=7 + i, **options) for i in range(4)]
    assert [sample.ids for sample in samples] == [each.ids for each in alone]
    assert [sample.text for sample in samples] == [each.text for each in alone]
    assert len({sample.text for sample in samples}) > 1
    prompt = alone[0].usage.prompt_tokens
    assert reports == [prompt]  # read once
    assert [sample.usage.cached_tokens for sample in samples] == [0, prompt - 1, prompt - 1, prompt - 1]
    unseeded = model.generate(text, n=2, max_tokens=8, temperature=1.5, stop=iter(["."]))
    assert unseeded[0].ids != unseeded[1].ids
    assert [len(model.generate("1", n=1, max_tokens=1)), len(model.generate("1", n=2, max_tokens=1))] == [1, 2]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_impossible_numbers_of_samples(model: ReferenceModel, n: Any) -> None:
    with pytest.raises(OptionError, match=r"n is .*; it must be a whole number, 1 or more"):
        generate(model, "x", n=n)


def test_usage_counts_the_models_time_and_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("npqwen.generation.sequence.time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(Reciter):
        def forward(self, ids: ArrayLike, *args: Any, **options: Any) -> NDArray[np.float32]:
            clock.now += 0.5 * np.size(ids)
            return super().forward(ids, *args, **options)

    pieces = stream(Slow("1234", sampling=Sampling(temperature=0)), "1 + 1")
    for _ in pieces:
        clock.now += 100  # the caller takes its time
    usage = pieces.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (4, 5)
    assert usage.prefill_seconds == usage.first_token_seconds == 2.0
    assert usage.decode_seconds == 2.0
    assert usage.prefill_rate == 2.0
    assert usage.decode_rate == 2.0


def test_progress_follows_the_prompt(model: ReferenceModel) -> None:
    reports: list[tuple[int, int]] = []
    generate(model, "a " * 100, max_tokens=1, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1] >= 100
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


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


def test_a_list_of_prompts_gives_what_each_gives_alone(model: ReferenceModel) -> None:
    prompts = ["A river is", SUM, "1"]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.1, "seed": 3}
    alone = [model.generate(prompt, **options) for prompt in prompts]
    for given in (prompts, tuple(prompts)):
        found = model.generate(given, stop=iter(["zzz"]), **options)
        assert [each.ids for each in found] == [each.ids for each in alone]
        assert [each.usage.prompt_tokens for each in found] == [each.usage.prompt_tokens for each in alone]
    assert [each.ids for each in model.generate(prompts[:1], **options)] == [alone[0].ids]
    assert model.generate([]) == []


def test_samples_of_a_list_of_prompts(model: ReferenceModel) -> None:
    prompts = ["A river is", "1"]
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 1.1, "seed": 3}
    alone = [model.generate(prompt, n=2, **options) for prompt in prompts]
    found = model.generate(prompts, n=2, **options)
    assert [[each.ids for each in both] for both in found] == [[each.ids for each in both] for both in alone]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["1", ""], OptionError, r"prompts\[1\] is empty"),
        (["1", None], OptionError, r"prompts\[1\] is None; give text or token ids"),
        (["1", "a b " * 2000], ContextLengthError, r"prompts\[1\] is too long"),
        (5, OptionError, "the prompt is 5; give text, token ids, or a list of prompts"),
        ({"1": 2}, OptionError, "the prompt is {'1': 2}; give text, token ids, or a list of prompts"),
        (iter("ab"), OptionError, "give text, token ids, or a list of prompts"),
        ([1, "a"], OptionError, "the prompt has 'a'; each token id must be a whole number"),
        ([[1], [0.5]], OptionError, r"prompts\[1\] has 0\.5; each token id must be a whole number"),
        (["1", [4128]], OptionError, "token id 4128"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_list_with_a_wrong_prompt_is_refused_before_anything_runs(
    model: ReferenceModel, prompts: Any, error: type[Exception], message: str
) -> None:
    read: list[int] = []
    with pytest.raises(error, match=message):
        model.generate(prompts, max_tokens=1, progress=lambda done, total: read.append(done))
    assert read == []
