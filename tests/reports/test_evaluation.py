"""`npqwen.evaluate`: numbers computed again in NumPy from the reference's logits, windows counted by hand, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, make_config, write_checkpoint
from converted import small_model
from npqwen_quant import convert
from reference import ReferenceModel

import npqwen
from npqwen import OptionError
from npqwen.engine.substitution import Part, parts, substituted
from npqwen.errors import CheckpointError
from npqwen.model import load
from npqwen.reports.evaluation import Window, compare, evaluate, windows

TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")
MOE = Path(__file__).parents[1] / "data" / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


@pytest.fixture(scope="module")
def other(reference: ReferenceModel) -> ReferenceModel:
    """A second model to compare with: the same weights, but for some noise."""
    rng = np.random.default_rng(5)
    noisy = {
        name: value * (1 + 0.25 * rng.standard_normal(value.shape, np.float32))
        for name, value in reference.weights.items()
    }
    return ReferenceModel(reference.config, noisy, TINY)


def log_probabilities(model: ReferenceModel, ids: Sequence[int]) -> np.ndarray:
    """float64 (tokens, vocab_size)."""
    logits = model.logits(np.array(ids)).astype(np.float64)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return found


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "expected"),
    [
        # (start, first counted token, end)
        (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
        (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),  # the last window would have no context for its only token
        (10, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (9, 4, 3, [(0, 1, 4), (3, 4, 7), (6, 7, 9)]),
        (8, 4, 1, [(0, 1, 4), (1, 4, 5), (2, 5, 6), (3, 6, 7), (4, 7, 8)]),
        (3, 4, 2, [(0, 1, 3)]),
        (2, 2, 1, [(0, 1, 2)]),
        (1, 4, 4, []),
    ],
)
def test_windows_by_hand(tokens: int, window: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    assert list(windows(tokens, window, stride)) == [Window(*found) for found in expected]


@pytest.mark.parametrize("window", [2, 3, 7, 16])
def test_overlapping_windows_count_every_token_but_the_first_once(window: int) -> None:
    for stride in range(1, window):
        for tokens in range(2, 40):
            found = list(windows(tokens, window, stride))
            assert [t for w in found for t in range(w.first, w.end)] == list(range(1, tokens))
            assert all(w.first - w.start >= window - stride for w in found[1:])
            assert all(w.end - w.start <= window for w in found)


@pytest.mark.parametrize("stride", [40, 25])
def test_numbers_of_plain_numpy(reference: ReferenceModel, other: ReferenceModel, stride: int) -> None:
    texts = {"long": TEXT[:700], "short": "What is 17 + 25?"}
    nll, base_nll, kl, same = [], [], [], []
    for text in texts.values():
        ids = reference.tokenizer.encode(text)
        counted = 1
        for start in range(0, len(ids), stride):
            piece = ids[start : start + 40]
            q, p = log_probabilities(other, piece), log_probabilities(reference, piece)
            for t in range(max(1, counted - start), len(piece)):
                nll.append(-q[t - 1, piece[t]])
                base_nll.append(-p[t - 1, piece[t]])
                kl.append((np.exp(p[t - 1]) * (p[t - 1] - q[t - 1])).sum())
                same.append(p[t - 1].argmax() == q[t - 1].argmax())
            counted = start + len(piece)
            if counted == len(ids):
                break
    found = evaluate(other, texts, reference, window=40, stride=stride, prompts=0)
    total, divergence = found.total, found.total.divergence
    assert divergence is not None
    assert (found.window, found.stride, total.tokens) == (40, stride, len(nll))
    n = len(nll)
    assert total.nll.mean == pytest.approx(np.mean(nll), abs=1e-5)
    assert total.nll.error == pytest.approx(np.std(nll, ddof=1) / math.sqrt(n), rel=1e-4)
    assert total.perplexity.mean == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert total.perplexity.error == pytest.approx(total.perplexity.mean * total.nll.error)
    assert divergence.base_nll.mean == pytest.approx(np.mean(base_nll), abs=1e-5)
    difference = np.subtract(nll, base_nll)
    assert divergence.nll_increase.mean == pytest.approx(difference.mean(), abs=1e-5)
    assert divergence.nll_increase.error == pytest.approx(difference.std(ddof=1) / math.sqrt(n), rel=1e-4)
    assert divergence.kl.mean == pytest.approx(np.mean(kl), rel=1e-5)
    assert divergence.kl.error == pytest.approx(np.std(kl, ddof=1) / math.sqrt(n), rel=1e-4)
    assert divergence.kl_99 == pytest.approx(np.quantile(kl, 0.99), abs=1e-4)
    assert divergence.kl_max == pytest.approx(max(kl), abs=1e-4)
    assert divergence.top_1.mean == np.mean(same)
    assert sum(score.tokens for score in found.texts.values()) == total.tokens
    assert list(found.texts) == ["long", "short"]
    assert found.texts["short"].nll.mean == pytest.approx(np.mean(nll[-found.texts["short"].tokens :]), abs=1e-5)


def test_greedy_continuations_by_hand(reference: ReferenceModel, other: ReferenceModel) -> None:
    """Of 3 of 5 windows: 0, 1 and 3. A prompt is half a window."""
    ids = reference.tokenizer.encode(TEXT)[:100]
    shares, equal = [], 0
    for start in (0, 20, 60):
        prefix = ids[start : start + 10]
        agreed = []
        for _ in range(16):
            token = int(reference.logits(prefix)[-1].argmax())
            agreed.append(int(other.logits(prefix)[-1].argmax()) == token)
            prefix = [*prefix, token]
        shares.append(np.mean(agreed))
        equal += all(agreed)
    found = evaluate(other, {"ids": ids}, reference, window=20, prompts=3).greedy
    assert found is not None
    assert (found.prompts, found.tokens, found.equal) == (3, 16, equal)
    assert found.agreement.mean == pytest.approx(np.mean(shares))
    assert found.agreement.error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(3))
    assert 0 < found.agreement.mean < 1


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_divergence_of_close_distributions_is_exact(scale: float) -> None:
    """float32 log-probabilities would bring an error of 1e-6, as large as int8's divergence."""
    rng = np.random.default_rng(1)
    base = (rng.standard_normal((40, 3000)) * 4 + 25).astype(np.float32)
    other = (base + scale * 1e-3 * rng.standard_normal(base.shape)).astype(np.float32)
    targets = rng.integers(0, 3000, 40)
    p, q = (x.astype(np.float64) for x in (base, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    found = compare(other, targets, base)
    assert found.kl is not None
    assert np.abs(found.kl - (np.exp(p) * (p - q)).sum(1)).max() < 1e-7
    assert found.kl.min() >= 0
    assert np.abs(found.nll + q[np.arange(40), targets]).max() < 2e-6
    same = compare(base, targets, base.copy())
    assert same.kl is not None
    assert same.same_top is not None
    assert not same.kl.any()
    assert same.same_top.all()


def test_a_models_logits_are_computed_a_few_at_a_time(
    reference: ReferenceModel, other: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = reference.tokenizer.encode(TEXT)[:150]
    expected = evaluate(other, {"ids": ids}, reference, window=100, stride=60, prompts=2)
    sizes: list[int] = []
    forward = ReferenceModel.forward

    def counted(self: Any, ids: Any, cache: Any, *, all_logits: bool = False, out: Any = None) -> Any:
        if all_logits:
            sizes.append(len(ids))
            assert out is None or out.shape == (len(ids), self.config.vocab_size)
        return forward(self, ids, cache, all_logits=all_logits)

    monkeypatch.setattr(ReferenceModel, "forward", counted)
    monkeypatch.setattr("npqwen.reports.evaluation._LOGITS_BYTES", 4 * reference.config.vocab_size * 16)
    calls: list[tuple[int, int]] = []
    found = evaluate(
        other, {"ids": ids}, reference, window=100, stride=60, prompts=2,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert max(sizes) == 16
    assert found.total.nll.mean == pytest.approx(expected.total.nll.mean, abs=1e-5)
    assert found.greedy == expected.greedy
    work = 2 * (100 + 90) + 2 * (50 + 16 + 45 + 16)
    assert calls[-1] == (work, work)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    ("texts", "options", "problem"),
    [
        ("", {}, "text is too short; a text must have at least 2 tokens"),
        ("a", {}, "text is too short"),
        ([], {}, "no text to evaluate"),
        ([1, 2], {}, "texts must be"),
        ({"x": [1, "2"]}, {}, "x has '2'"),
        ("some text", {"window": 1}, "window is 1"),
        ("some text", {"window": 1 << 20}, "window is 1048576"),
        ("some text", {"window": 8, "stride": 9}, "stride is 9"),
        ("some text", {"stride": 0}, "stride is 0"),
        ("some text", {"layers": True}, "layers compares two models"),
    ],
)
def test_refusals(reference: ReferenceModel, texts: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        evaluate(reference, texts, **options)


def test_models_that_cannot_be_compared(reference: ReferenceModel, tmp_path: Path) -> None:
    config = make_config(vocab_size=5000)
    write_checkpoint(tmp_path / "larger", config, tokenizer=True)
    larger = ReferenceModel.from_directory(tmp_path / "larger")
    with pytest.raises(OptionError, match=r"has 4128 logits and .* 5000; only models of the same vocabulary"):
        evaluate(reference, "some text", larger)
    with pytest.raises(OptionError, match="layers needs two converted models"):
        evaluate(reference, "some text", reference, layers=True)
    write_checkpoint(tmp_path / "other", make_config(vocab_size=4128), tokenizer=True)
    path = tmp_path / "other" / "tokenizer.json"
    spelled = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = spelled["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(spelled), encoding="utf-8")
    other = ReferenceModel.from_directory(tmp_path / "other")
    with pytest.raises(OptionError, match=r"the tokenizers of .* differ"):
        evaluate(reference, "some text", other)


def test_logits_that_are_not_finite(reference: ReferenceModel) -> None:
    weights = {**reference.weights, "model.norm.weight": np.full(256, np.nan, np.float32)}
    broken = ReferenceModel(reference.config, weights, TINY)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(broken, "some text")


# --- the cost of each part ---


@pytest.mark.parametrize("source", [TINY, MOE], ids=["dense", "mixture"])
def test_costs_of_parts(source: Path, tmp_path: Path) -> None:
    """Each is a model of its own: bf16, but for the part, which is the int4 model's."""
    for bits in (16, 4):
        convert(source, tmp_path / str(bits), bits=bits)
    ids = np.random.default_rng(0).integers(0, 4096, 50)
    with load(tmp_path / "16", threads=2) as base, load(tmp_path / "4", threads=2) as model:
        expected = base.logits(ids)
        found = evaluate(model, {"ids": ids.tolist()}, base, prompts=0, layers=True).layers
        assert found is not None
        names = [part.name for part in parts(base, model)]
        layers = [f"layer {i}" for i in range(base.config.num_hidden_layers)]
        assert names[: len(layers) + 2] == ["embedding", *layers, "output matrix"]
        assert ("experts of all layers" in names) == (source == MOE)
        assert [part.part for part in found.parts] == names
        assert found.tokens == 49
        assert all(0 < part.kl.mean < 2 * found.whole.mean for part in found.parts)
        for part, cost in zip(parts(base, model), found.parts, strict=True):
            kl = compare(substituted(base, model, part).logits(ids)[:-1], ids[1:], expected[:-1]).kl
            assert kl is not None
            assert cost.kl.mean == pytest.approx(kl.mean(), rel=1e-4)
        every = base.weights.layers.dtype.names
        assert every is not None
        # All parts together are the int4 model, but for its float16 cache.
        whole = substituted(base, model, Part("layers", every, tuple(range(len(layers)))))
        whole = substituted(whole, model, Part("outside", ("embed_tokens", "lm_head")))
        rest = compare(whole.logits(ids), ids, model.logits(ids)).kl
        assert rest is not None
        assert rest.mean() < 0.3 * found.whole.mean
        assert np.array_equal(base.logits(ids), expected)


def test_a_substituted_layer_of_the_oracle(tiny: Callable[[int], Path]) -> None:
    """One layer's weights of another checkpoint, both in bf16: the NumPy reference with these tensors."""
    reference = ReferenceModel.from_directory(TINY)
    layer = "model.layers.2."
    changed = {
        name: 2 * value if name.startswith(layer) and "proj" in name else value
        for name, value in reference.weights.items()
    }
    ids = np.random.default_rng(0).integers(0, 4096, 30)
    place = tiny(16).parent / "changed"
    if not place.exists():
        write_checkpoint(place, json.loads((TINY / "config.json").read_text()), changed, tokenizer=True)
        convert(place, place / "../changed-16", bits=16)
    with load(tiny(16), threads=1) as base, load(place / "../changed-16", threads=1) as other:
        part = next(part for part in parts(base, other) if part.name == "layer 2")
        found = substituted(base, other, part)
        assert np.abs(found.logits(ids) - ReferenceModel(reference.config, changed).logits(ids)).max() < 1e-3
        assert found.fingerprint  # of its own weights
        wrong = next(part for part in parts(base, other) if part.name == "layer 1")
        assert np.array_equal(substituted(base, other, wrong).logits(ids), base.logits(ids))


def test_layers_of_other_dimensions_are_refused(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    path = small_model(tmp_path / "small", 4, vocab_size=4128)
    with load(tiny(4), threads=1) as model, load(path, threads=1) as other:
        with pytest.raises(OptionError, match="have different dimensions"):
            evaluate(model, "some text", other, layers=True)
        evaluate(model, "some text", other)


def test_evaluate_is_a_name_of_the_package(reference: ReferenceModel) -> None:
    assert npqwen.evaluate is evaluate
    found = npqwen.evaluate(reference, ["A river is", "What is 17 + 25?"])
    assert isinstance(found, npqwen.Evaluation)
    assert list(found.texts) == ["text 1", "text 2"]
    assert found.total.divergence is None
    with pytest.raises(OptionError, match="only a comparison"):
        found.as_record()
