"""Live LoRA adapters on hybrids: held to PEFT's logits, to NumPy with merged weights, and to themselves in company."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import read_safetensors
from hybrids import HYBRIDS, golden, hybrid_checkpoint, write_odd_hybrid
from lora import change_tensors, rounded, write_adapter
from npqwen_quant import convert, unquantized
from npqwen_quant.adapter import AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from safetensors.numpy import load_file, save_file

import npqwen
from npqwen.engine.hidden_tail import HiddenTail
from npqwen.engine.piece import Piece
from npqwen.model import Model, load

DATA = Path(__file__).parents[1] / "data"
PEFT = np.load(DATA / "hybrid_adapters.npz")
TOLERANCE = 1e-3
"""As in tests/engine/test_hybrid.py."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECURRENT = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "shared_expert_gate", "gate")
IDS = np.random.default_rng(1).integers(0, 300, 90)


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Of its layers."""
    stored = read_safetensors(checkpoint / "model.safetensors")
    return {name: tensor.shape for name, tensor in stored.items() if ".layers." in name and name.startswith("model.")}


@pytest.fixture(scope="module", params=HYBRIDS)
def mixed(
    request: pytest.FixtureRequest, hybrid: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """A hybrid in int4 with adapters of all matrices, of recurrent layers alone, and of rank 1."""
    place = tmp_path_factory.mktemp("adapters")
    every = shapes(DATA / "hybrid" / request.param)
    kinds = {"all": (*ATTENTION, *RECURRENT, *MLP), "recurrent": RECURRENT, "one": ("q_proj", "in_proj_b", *MLP)}
    for seed, (name, modules) in enumerate(kinds.items()):
        write_adapter(place / name, every, modules, rank=(20, 4, 1)[seed], seed=seed, size=1)
    with load(hybrid(request.param, 4), threads=2, adapters={name: place / name for name in kinds}) as model:
        yield model


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_are_pefts_in_pieces_of_any_size(hybrid: Callable[[str, int], Path], name: str) -> None:
    ids, columns, base = golden(name)
    with load(hybrid(name, 16), threads=2, adapters={"a": DATA / "adapters" / f"hybrid-{name}"}) as model:
        whole = model.logits(ids, adapter="a")
        assert np.abs(whole[:, columns[::4]] - PEFT[name]).max() < TOLERANCE
        assert np.abs(model.logits(ids)[:, columns] - base).max() < TOLERANCE
        for size in (1, 7, 64):
            cache = model.new_cache(adapter="a")
            parts = [model.forward(ids[at : at + size], cache, all_logits=True) for at in range(0, len(ids), size)]
            assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_convert_merges_says_the_same(hybrid: Callable[[str, int], Path], tmp_path: Path, name: str) -> None:
    """Before the merged weights are rounded, and with half the adapter's effect."""
    adapter, (ids, columns, _) = AdapterFile(DATA / "adapters" / f"hybrid-{name}", 0.5), golden(name)
    checkpoint = Checkpoint(hybrid_checkpoint(name, tmp_path / "in"), adapters=[adapter])
    (states,) = unquantized.final_states(checkpoint, ids[None])
    with load(hybrid(name, 16), threads=1, adapters={"half": adapter}) as model:
        found = model.logits(ids, adapter="half")
    assert np.abs(found - unquantized.logits(checkpoint, states)).max() < TOLERANCE
    assert np.abs(found[:, columns[::4]] - PEFT[name]).max() > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_those_of_merged_weights(tmp_path: Path, threads: int) -> None:
    """In NumPy, of sizes that differ wherever they can, with ranks above and below 16, experts and router included."""
    source = tmp_path / "in"
    every = {name: tensor.shape for name, tensor in write_odd_hybrid(source).items() if ".layers." in name}
    convert(source, tmp_path / "model", bits=16)
    kinds = {"all": (*ATTENTION, *RECURRENT, *MLP), "some": ("in_proj_ba", "q_proj", "shared_expert_gate", "o_proj")}
    for rank, (name, modules) in zip((21, 4), kinds.items(), strict=True):
        write_adapter(tmp_path / name, every, modules, rank=rank, size=1, seed=rank)
        factors = load_file(tmp_path / name / "adapter_model.safetensors")
        change_tensors(tmp_path / name, {key: rounded(tensor) for key, tensor in factors.items()})
    with load(tmp_path / "model", threads=threads, adapters={name: tmp_path / name for name in kinds}) as model:
        base = model.logits(IDS)
        chosen: list[str | None] = [None, *kinds]
        for one in chosen:
            checkpoint = Checkpoint(source, adapters=[AdapterFile(tmp_path / one)] if one else [])
            (states,) = unquantized.final_states(checkpoint, IDS[None])
            oracle = unquantized.logits(checkpoint, states)
            found = model.logits(IDS, adapter=one)
            assert np.abs(found - oracle).max() < TOLERANCE, one
            assert one is None or np.abs(found - base).max() > 0.1


def test_tokens_are_the_same_to_the_bit_alone_and_in_company(mixed: Model) -> None:
    """Prompts, single tokens and draft tokens of texts with several adapters, and with none, in one pass."""
    names = [None, "all", "one", None, "recurrent", "all", "all", "one", "all", "all"]
    sizes = [3, 30, 1, 40, 5, 1, 1, 2, 1, 1]
    alone, caches = [], []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        cache, twin = mixed.new_cache(64, name), mixed.new_cache(64, name)
        for each in (cache, twin):
            mixed.prefill(IDS[i : i + 7], each)
        alone.append(np.concatenate([mixed.forward([id], twin) for id in IDS[:size]]))
        caches.append(cache)
    pieces = [
        Piece(IDS[:size].astype(np.int64), cache, size, min(size - 1, 4))
        for cache, size in zip(caches, sizes, strict=True)
    ]
    for found, expected in zip(mixed.forward_pieces(pieces), alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len({rows[0].tobytes() for rows in alone}) > 4
    caches[1].retract(4)  # these go on from a state of the adapter
    again = mixed.forward(IDS[26:30], caches[1], all_logits=True)
    np.testing.assert_array_equal(again, alone[1][26:])


def test_threads_do_not_change_a_bit(mixed: Model) -> None:
    adapters = {name: adapter.directory for name, adapter in mixed.adapters.items()}
    with load(mixed.path, threads=1, adapters=adapters) as other:
        for name in adapters:
            np.testing.assert_array_equal(other.logits(IDS, adapter=name), mixed.logits(IDS, adapter=name))


def test_texts_without_adapter_are_those_of_a_model_without(mixed: Model) -> None:
    with load(mixed.path, threads=2) as plain:
        np.testing.assert_array_equal(plain.logits(IDS), mixed.logits(IDS))


def test_parts_of_a_matrix_share_its_first_factor(hybrid: Callable[[str, int], Path], tmp_path: Path) -> None:
    every = shapes(DATA / "hybrid" / "next")
    directory = write_adapter(tmp_path / "a", every, ("q_proj", "in_proj_qkvz", "in_proj_ba"), rank=16)
    with load(hybrid("next", 4), threads=1, adapters={"a": directory}) as model:
        # Three layers with A of two matrices, and their B of 384 and twice 16 rows; one layer with q_proj's 256.
        assert model.adapters.nbytes == 2 * 16 * (3 * (2 * 128 + 384 + 32) + 128 + 256)


def test_the_draft_layer_runs_without_adapter(hybrid: Callable[[str, int], Path], tmp_path: Path) -> None:
    path = hybrid("mtp", 16)
    directory = write_adapter(tmp_path / "a", shapes(DATA / "hybrid" / "mtp"), (*ATTENTION, *RECURRENT), size=1)
    states = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    found = []
    for adapters in ({}, {"a": directory}):
        with load(path, threads=2, adapters=adapters) as model:
            for name in (None, *adapters):
                cache, out = model.new_cache(adapter=name), np.empty((1, 4128), np.float32)
                cache.tail = HiddenTail(64)
                model.forward(IDS[:20], cache)
                assert model.draft_layer is not None
                model.draft_layer.run(IDS[:5], states, model.draft_layer.new_cache(), out)
                found.append((cache.tail.rows(0, 20).copy(), out))
    for _, logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0][1])
    np.testing.assert_array_equal(found[1][0], found[0][0])
    assert np.abs(found[2][0] - found[0][0]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "module", "problem"),
    [
        ("next", "linear_attn.in_proj_qkv", "adapts model.layers.0.linear_attn.in_proj_qkv.weight, which the"),
        ("qwen35", "linear_attn.in_proj_qkvz", "in_proj_qkvz.weight, which the model lacks; is it of another model?"),
        ("qwen35", "self_attn.q_gate", "self_attn.q_gate.weight, which the model lacks"),
        ("qwen35", "linear_attn.conv1d", "linear_attn.conv1d.weight, which the model lacks"),
        ("mtp", "mtp.layers.0.mlp.up_proj", "adapts mtp.layers.0.mlp.up_proj.weight, which is only possible when it"),
    ],
)
def test_adapters_of_other_hybrids_are_refused(
    hybrid: Callable[[str, int], Path], tmp_path: Path, name: str, module: str, problem: str
) -> None:
    layer = "" if name == "mtp" else f"model.layers.{3 if 'self' in module else 0}."
    shape = {f"{layer}{module}.weight": (128, 128)}
    directory = write_adapter(tmp_path / "a", shape, (module.rpartition(".")[2],))
    with pytest.raises(npqwen.CheckpointError) as error:
        load(hybrid(name, 4), adapters={"a": directory})
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_shape_is_told_in_the_checkpoints_terms(hybrid: Callable[[str, int], Path], tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", {"model.layers.3.self_attn.q_proj.weight": (128, 128)}, ("q_proj",))
    with pytest.raises(npqwen.CheckpointError, match=r"with shape \[128, 128\], but the model's is \[256, 128\]"):
        load(hybrid("next", 4), adapters={"a": directory})


def test_an_adapter_of_images_alone_adapts_nothing(hybrid: Callable[[str, int], Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DATA / "adapters" / "hybrid-qwen35", tmp_path / "a"))
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in bits_of(file).items() if ".visual." in name}, file)
    with pytest.raises(npqwen.CheckpointError, match="adapts nothing of the text model"):
        load(hybrid("qwen35", 4), adapters={"a": directory})


def bits_of(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of bf16 as float32."""
    stored = read_safetensors(file)
    return {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in stored.items()}
