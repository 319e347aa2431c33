"""Mixtures of experts: the routing kernels against NumPy, whole models against transformers and the reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, random_tensors, shapes, write_checkpoint
from converted import random_units
from kernel_calls import together
from npqwen_quant import convert
from reference import ReferenceModel

from npqwen.engine import buffers
from npqwen.engine.budget import RESERVED
from npqwen.engine.records import LAYER, Adapted
from npqwen.errors import FormatError
from npqwen.format.encodings import INT4, INT8, Encoding
from npqwen.hardware import machine
from npqwen.kernels import experts
from npqwen.kernels.matmul import local_floats, matmul_kernels, scratch_floats
from npqwen.kernels.packing import WIDEST, pack, packed_bytes
from npqwen.kernels.paging import PREFETCH_ALWAYS, PREFETCH_IF_ABSENT, PREFETCH_NEVER
from npqwen.model import load
from npqwen.reports import info
from npqwen.wording import size

DATA = Path(__file__).parents[1] / "data"
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


NOT_KEPT = np.zeros((0, 128), np.float32)
"""Rows for what adapters read, of which there are none."""


def no_adapters() -> Adapted:
    """The adapters of a pass without any."""
    dimensions = {"kernels": 2, "shrinks": 4, "expands": 4, "most_groups": 2}
    dimensions |= {"expert_shrinks": 5, "expert_expands": 5, "expert_most_groups": 2}
    dimensions |= {"tiles": 2, "token_adapters": 1, "normed": 2, "gated": 2, "reduced": 3}
    dimensions |= {"slot_adapters": 1, "slot_gated": 2, "slot_reduced": 3}
    floats = {"normed", "gated", "reduced", "slot_gated", "slot_reduced"}
    return Adapted(
        **{name: np.zeros((0,) * n, np.float32 if name in floats else np.int64) for name, n in dimensions.items()}
    )


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(DATA / "tiny-qwen3-moe.npz")


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "model"
    convert(DATA / "tiny-qwen3-moe", out, bits=16)
    return out


def test_the_logits_are_those_of_transformers(tiny_moe: Path, golden: Any) -> None:
    with load(tiny_moe) as model:
        for k in range(4):
            ids, logits = golden[f"ids_{k}"], golden[f"logits_{k}"]
            assert np.abs(model.logits(ids) - logits).max() < 1e-3
            cache = model.new_cache()
            stepped = np.concatenate([model.forward([id], cache) for id in ids])
            assert np.abs(stepped - logits).max() < 1e-3


def test_greedy_continuations_are_those_of_transformers(tiny_moe: Path, golden: Any) -> None:
    with load(tiny_moe) as model:
        for k in range(4):
            cache = model.new_cache()
            logits = model.prefill(golden[f"ids_{k}"], cache)
            drawn = []
            for _ in golden[f"greedy_{k}"]:
                drawn.append(int(logits.argmax()))
                logits = model.forward([drawn[-1]], cache)[0]
            assert drawn == golden[f"greedy_{k}"].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
        {"num_experts": None, "num_local_experts": 20, "num_experts_per_tok": 8, "moe_intermediate_size": 16},
        {"num_experts": 160, "num_experts_per_tok": 1},
        {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 200},
    ],
    ids=["plain", "not normalized", "mixed with dense layers", "the newer key", "160 experts", "all chosen"],
)
def test_a_random_mixture_is_the_references(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, make_config(vocab_size=4130, **(MOE | changes)), tokenizer=True)
    convert(source, tmp_path / "out", bits=16)
    reference = ReferenceModel.from_directory(source)
    rng = np.random.default_rng(0)
    with load(tmp_path / "out", threads=3) as model:
        for count in (1, 2, 7, 40, 150):
            ids = rng.integers(0, 4130, count)
            want = reference.logits(ids)
            assert np.abs(model.logits(ids) - want).max() < 1e-3
        cache = model.new_cache()
        pieces = [model.forward(ids[a:b], cache, all_logits=True) for a, b in ((0, 33), (33, 34), (34, 38), (38, 150))]
        assert np.abs(np.concatenate(pieces) - want).max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mixture", [True, False])
def test_tokens_one_by_one_are_those_of_a_prompt_to_the_bit(tmp_path: Path, mixture: bool, bits: int) -> None:
    config = make_config(vocab_size=4130, **(MOE if mixture else {}))
    write_checkpoint(tmp_path / "source", config, tokenizer=True)
    convert(tmp_path / "source", tmp_path / "out", bits=bits)
    ids = np.random.default_rng(0).integers(0, 4130, 150)
    with load(tmp_path / "out", threads=2) as model:
        whole = model.logits(ids)
        for sizes in ([1] * 150, [100, 4, 1, 45], [3, 17, 130]):
            cache = model.new_cache()
            ends = np.cumsum([0, *sizes])
            parts = [model.forward(ids[a:b], cache, all_logits=True) for a, b in itertools.pairwise(ends)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_info_tells_how_many_experts_memory_holds(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny mixture has 8 experts, of which a token uses 2."""
    whole = info.inspect(tiny_moe)
    experts, beside = whole.parts["experts"], whole.working + whole.cache + RESERVED

    def memory_line(resident: int) -> str:
        monkeypatch.setattr(machine, "available_memory", lambda: beside + resident)
        found = info.inspect(tiny_moe)
        assert found.as_dict()["resident_weights"] == max(0, min(resident, whole.weights))
        return next((line for line in info.describe(found).splitlines() if line.startswith("memory holds")), "")

    assert memory_line(whole.weights + 1).endswith("all of the weights")
    assert f"all but {size(experts // 2)} of the experts" in memory_line(whole.weights - experts // 2)
    assert f"of the {size(experts / 4)} that a token uses, about 50% ({size(experts / 8)}) are read" in (
        memory_line(whole.weights - experts // 2)
    )
    assert "about 100%" in memory_line(whole.weights - experts)
    assert "very slow" in memory_line(whole.weights - experts - 1)
    assert "very slow" in memory_line(-5)
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    assert "memory holds" not in info.describe(info.inspect(tiny_moe))


def test_prefetching_experts_changes_no_logits(tiny_moe: Path, golden: Any) -> None:
    ids = golden["ids_0"]
    with load(tiny_moe, threads=2) as model:
        found = []
        for policy in (PREFETCH_NEVER, PREFETCH_ALWAYS, PREFETCH_IF_ABSENT):
            model.weights.model[0]["prefetch"] = policy
            found.append(model.logits(ids))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_each_chosen_expert_is_prefetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate_up_proj of all experts before down_proj of any: in the order of use."""
    layer = np.zeros(1, LAYER).view(np.recarray)[0]
    layer["gate_up_proj"]["address"], layer["down_proj"]["address"], layer["expert_bytes"] = 1000, 1200, 300
    segments = np.zeros((5, 4), np.int64)
    segments[:, experts.EXPERT] = [2, 2, 3, 7, 7]
    requests: list[tuple[int, int]] = []
    monkeypatch.setattr(
        experts, "prefetch_pages", lambda policy, address, size, residency: requests.append((int(address), int(size)))
    )
    for n in range(12):
        experts.prefetch_matrix.py_func(PREFETCH_ALWAYS, layer, segments, 5, n, np.empty(4, np.float32))
    assert requests == [(1000 + 300 * e, 200) for e in (2, 3, 7)] + [(1200 + 300 * e, 100) for e in (2, 3, 7)]


@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_softmax_then_the_largest(normalize: bool) -> None:
    rng = np.random.default_rng(1)
    for count, chosen in ((1, 1), (8, 2), (128, 8), (160, 8), (5, 5)):
        scores = rng.standard_normal(count).astype(np.float32) * 3
        probabilities = np.exp(scores.astype(np.float64) - scores.max())
        probabilities /= probabilities.sum()
        want = np.argsort(-probabilities, kind="stable")[:chosen]
        total = probabilities[want].sum() if normalize else 1.0
        found, weights = np.empty(chosen, np.int64), np.empty(chosen, np.float32)
        experts.route(scores.copy(), normalize, found, weights)
        assert found.tolist() == want.tolist()
        np.testing.assert_allclose(weights, probabilities[want] / total, rtol=1e-5)


def test_of_equal_experts_the_first_is_chosen() -> None:
    found, weights = np.empty(2, np.int64), np.empty(2, np.float32)
    experts.route(np.array([1, 3, 3, 3], np.float32), True, found, weights)
    assert found.tolist() == [1, 2]
    np.testing.assert_allclose(weights, [0.5, 0.5])


@pytest.mark.parametrize("chosen", [1, 2, 8])
@pytest.mark.parametrize(
    "scores",
    [
        [np.nan] * 8,
        [0, 1, np.nan, 3, 4, 5, 6, 7],
        [np.nan, 1, 2, 3, 4, 5, 6, 7],
        [np.inf] * 8,
        [0, 1, 2, np.inf, 4, 5, 6, 7],
        [-np.inf] * 8,
        [np.inf, -np.inf, np.nan, 0, 0, 0, 0, 0],
        [0.0] * 8,
        [3.4e38, -3.4e38, 0, 0, 0, 0, 0, 0],
        [-np.inf, -np.inf, 1, 2, 3, 4, 5, 6],
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_no_expert_is_chosen_twice_whatever_the_scores(scores: list[float], chosen: int, normalize: bool) -> None:
    found, weights = np.full(chosen, -1, np.int64), np.empty(chosen, np.float32)
    experts.route(np.array(scores, np.float32), normalize, found, weights)
    assert len(set(found.tolist())) == chosen
    assert all(0 <= expert < 8 for expert in found)
    largest = max(scores)
    has_softmax = not any(np.isnan(scores)) and np.isfinite(largest)
    assert np.isfinite(weights).all() if has_softmax else np.isnan(weights).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_router_weights_that_overflow_end_as_an_error(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite bf16 weights of 3.39e38 make scores of infinity and NaN: nothing is written past the threads' buffers."""
    behind: list[np.ndarray] = []

    def guarded(size: int) -> np.ndarray:
        raw = np.zeros(size + (1 << 20) + 64, np.uint8)
        start = -raw.ctypes.data % 64
        raw[start + size :] = 77
        behind.append(raw[start + size :])
        return raw[start : start + size]

    monkeypatch.setattr(buffers, "_bytes", guarded)
    config = make_config(vocab_size=4130, max_position_embeddings=1024, **(MOE | {"num_experts_per_tok": 8}))
    weights = random_tensors(config)
    largest = np.array(0x7F7F0000, np.uint32).view(np.float32)
    weights["model.layers.0.mlp.gate.weight"][:] = largest
    write_checkpoint(tmp_path / "in", config, weights, tokenizer=True)
    convert(tmp_path / "in", tmp_path / "out", bits=bits)
    ids = np.random.default_rng(0).integers(0, 4096, 512)
    with load(tmp_path / "out", threads=1) as model:
        model.prefill(ids, model.new_cache())
        assert behind
        assert all((tail == 77).all() for tail in behind)
        with pytest.raises(FormatError, match="damaged weights"):
            model.generate("once upon a time " * 100, max_tokens=3)


def test_a_segment_of_more_tokens_than_the_pass_stays_in_its_buffer() -> None:
    """Results are bounded by the buffer, whatever counts the segments have."""
    rng = np.random.default_rng(0)
    units = random_units(8, np.ones(64, bool), 128, rng)
    layer = np.zeros(1, LAYER)[0]
    layer["gate_up_proj"]["address"] = units.rows.ctypes.data
    down = random_units(8, np.ones(16, bool), 128, rng)
    layer["down_proj"]["address"] = down.rows.ctypes.data
    for name, rows in (("gate_up_proj", 64), ("down_proj", 16)):
        layer[name]["encoding"], layer[name]["rows"], layer[name]["cols"] = INT8.code, rows, 128
    kernels, tokens = matmul_kernels([INT8.code]), 3 * 1024
    x = np.zeros(packed_bytes(tokens, 128), np.uint8)
    for t in range(tokens):
        pack(rng.standard_normal(128).astype(np.float32), t, WIDEST, INT8.code, x)
    segments = np.array([[0, 0, tokens, WIDEST]])
    adapters = no_adapters()
    found = []
    for pass_tokens in (16, tokens):  # the number of tokens that the kernel is given
        room = np.full(local_floats(pass_tokens, 4) + 4096 * 64, 77, np.float32)
        local = room[: local_floats(pass_tokens, 4)]
        gated = np.zeros(packed_bytes(tokens, 128), np.uint8)
        scratch = np.zeros(max(scratch_floats(128, 4), 128), np.float32)
        args = kernels, layer, PREFETCH_NEVER, segments, 1, pass_tokens, x, adapters, NOT_KEPT, local, scratch, gated
        together(1, experts.project_gated_slots, lambda _, args=args: args)  # type: ignore[misc]
        assert (room[len(local) :] == 77).all()
        results = np.zeros((tokens, 128), np.float32)
        more = (kernels, layer, PREFETCH_NEVER, segments, 1, pass_tokens, gated, adapters, results, scratch, local)
        together(1, experts.multiply_slots, lambda _, args=more: args)  # type: ignore[misc]
        assert (room[len(local) :] == 77).all()
        found.append((gated, results))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.any()


@pytest.mark.parametrize("encoding", [INT4, INT8], ids=lambda encoding: encoding.name)
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 8, 2), (5, 4, 3), (64, 128, 8), (300, 3, 1)])
def test_every_choice_has_a_slot_of_its_own_in_a_segment_of_its_expert(
    tokens: int, count: int, chosen: int, encoding: Encoding
) -> None:
    rng = np.random.default_rng(2)
    choice = np.array([rng.permutation(count)[:chosen] for _ in range(tokens)])
    slots = np.full_like(choice, -1)
    segments = np.zeros((experts.most_segments(tokens, count, chosen), 4), np.int64)
    segment_count = experts.arrange(choice, encoding.code, False, np.empty(count, np.int64), slots, segments)
    assert segment_count <= len(segments)
    assert len(set(slots.ravel().tolist())) == tokens * chosen
    end = 0
    covered = 0
    for s in range(segment_count):
        expert, first, size, width = segments[s]
        assert first == end
        end = first + -(-size // width) * width
        inside = (slots >= first) & (slots < first + size)
        assert (choice[inside] == expert).all()
        assert inside.sum() == size
        covered += size
        for slot in slots[inside]:
            assert experts.find_segment(segments, segment_count, slot) == s
    assert covered == tokens * chosen
    assert end <= experts.most_slots(tokens, count, chosen)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not report the peak of memory")
@pytest.mark.parametrize("shards", [1, 40])
def test_conversion_streams_expert_by_expert(tmp_path: Path, shards: int) -> None:
    """Converting a layer of 200 MB of experts takes a fraction of that memory, in one file or many shards."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 256, "num_hidden_layers": 1}
    config = make_config(**(MOE | sizes))
    value: dict[int, Any] = {1: np.float32(1.0), 2: np.uint16(0x3C12)}
    write_checkpoint(
        tmp_path / "in",
        config,
        {name: np.broadcast_to(value[len(shape)], shape) for name, shape in shapes(config).items()},
        shards=shards,
    )
    write_checkpoint(tmp_path / "small", make_config(**MOE))
    code = f"""
import resource
from pathlib import Path
from npqwen_quant import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
here = Path({str(tmp_path)!r})
convert(here / "small", here / "out-small", 4, threads=2)
before = peak()
convert(here / "in", here / "out", 4, threads=2)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 25e6
