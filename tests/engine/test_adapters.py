"""Live LoRA adapters: held to PEFT's logits, to plain NumPy with merged weights, and to themselves in company."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, TINY, make_config, random_tensors, shapes, write_checkpoint
from lora import ATTENTION, adapted, change_config, change_tensors, write_adapter
from npqwen_quant import convert
from npqwen_quant.adapter import AdapterFile
from reference import ReferenceModel

import npqwen
from npqwen.engine.piece import Piece
from npqwen.format.config import Config
from npqwen.model import Model, load

DATA = Path(__file__).parents[1] / "data"
ADAPTERS = DATA / "adapters"
B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
IDS = np.random.default_rng(1).integers(0, 200, 90)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the adapter of linear layers, to be changed."""
    return Path(shutil.copytree(ADAPTERS / "linear", tmp_path / "adapter"))


@pytest.fixture(scope="module", params=["dense", "mixture"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A small model in int4 with three adapters: of all matrices, of attention alone, and of rank 1."""
    place = tmp_path_factory.mktemp(request.param)
    config = make_config(**(MIXTURE if request.param == "mixture" else {}))
    write_checkpoint(place / "in", config, tokenizer=False)
    convert(place / "in", place / "model", bits=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, place / "model")
    every = shapes(config)
    write_adapter(place / "all", every, rank=20, size=2)
    write_adapter(place / "attention", every, ATTENTION, seed=1, size=2)
    write_adapter(place / "one", every, ("down_proj", "gate", "up_proj"), rank=1, seed=2, size=2)
    adapters = {name: place / name for name in ("all", "attention", "one")}
    with load(place / "model", threads=2, adapters=adapters) as model:
        yield model


def test_logits_are_pefts(tiny: Callable[[int], Path]) -> None:
    """With ranks and alphas by pattern, in two of four layers; factors are rounded to bf16."""
    golden = np.load(DATA / "adapters.npz")
    with load(tiny(16), threads=1, adapters={"linear": ADAPTERS / "linear"}) as model:
        found, base = model.logits(golden["ids"], adapter="linear"), model.logits(golden["ids"])
    assert np.abs(found - golden["linear"]).max() < 2e-3 * np.abs(golden["linear"]).max()
    assert np.abs(base - golden["linear"]).max() > 1


def test_what_convert_merges_says_the_same(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    convert(TINY, tmp_path / "merged", bits=16, adapters=[AdapterFile(ADAPTERS / "linear", 0.5)])
    ids = np.load(DATA / "adapters.npz")["ids"]
    with load(tmp_path / "merged", threads=1) as merged:
        expected = merged.logits(ids)
    with load(tiny(16), threads=1, adapters={"half": f"{ADAPTERS / 'linear'}:0.5"}) as model:
        found = model.logits(ids, adapter="half")
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # merged weights are rounded to bf16


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_those_of_merged_weights(tmp_path: Path, mixture: bool, threads: int) -> None:
    """In plain NumPy: all matrices of odd sizes, the router and experts, ranks above and below 16, and scales."""
    config = make_config(**(MIXTURE if mixture else {}))
    weights = random_tensors(config)
    write_checkpoint(tmp_path / "in", config, weights)
    convert(tmp_path / "in", tmp_path / "model", bits=16)
    modules = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "gate")
    write_adapter(tmp_path / "a", shapes(config), modules, rank=21, size=1, lora_alpha=42)
    write_adapter(tmp_path / "b", shapes(config), modules, rank=4, size=1, seed=1, lora_alpha=6, use_rslora=True)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    change_config(tmp_path / "c", alpha_pattern={"mlp.*": 0.0})
    other = adapted(weights, tmp_path / "b", 3.0)
    attention_only = {name: weights[name] if ".mlp." in name else other[name] for name in weights}
    expected = {"a": adapted(weights, tmp_path / "a", 2.0), "b": other, "c": attention_only}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "model")
    with load(tmp_path / "model", threads=threads, adapters={n: tmp_path / n for n in expected}) as model:
        for name, merged in expected.items():
            oracle = ReferenceModel(Config.from_directory(tmp_path / "in"), merged).logits(IDS)
            found = model.logits(IDS, adapter=name)
            assert np.abs(found - oracle).max() < 1e-3 * np.abs(oracle).max(), name
            assert np.abs(found - model.logits(IDS)).max() > 0.1
            np.testing.assert_array_equal(model.hidden(IDS, [1], adapter=name)[0], model.hidden(IDS, 1, adapter=name))


def test_tokens_are_the_same_to_the_bit_alone_and_in_company(mixed: Model) -> None:
    """Prompts and single tokens of texts with several adapters, and with none, in one pass."""
    names = [None, "all", "one", None, "attention", "all", "all", "one", "all", "all"]
    sizes = [3, 30, 1, 40, 5, 1, 1, 2, 1, 1]
    alone = {}
    caches = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        cache, twin = mixed.new_cache(64, name), mixed.new_cache(64, name)
        for each in (cache, twin):
            mixed.prefill(IDS[i : i + 7], each)
        alone[i] = np.concatenate([mixed.forward([id], twin) for id in IDS[:size]])
        caches.append(cache)
    pieces = [Piece(IDS[:size].astype(np.int64), cache, size) for cache, size in zip(caches, sizes, strict=True)]
    for i, rows in enumerate(mixed.forward_pieces(pieces)):
        np.testing.assert_array_equal(rows, alone[i])
    chosen = [alone[i][0] for i in (1, 2, 3, 4)]
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.pairwise(chosen))


def test_threads_do_not_change_a_bit(mixed: Model) -> None:
    adapters = {name: adapter.directory for name, adapter in mixed.adapters.items()}
    with load(mixed.path, threads=1, adapters=adapters) as other:
        for name in adapters:
            np.testing.assert_array_equal(other.logits(IDS, adapter=name), mixed.logits(IDS, adapter=name))


def test_an_adapter_that_adds_nothing_changes_no_bit(tiny: Callable[[int], Path], adapter: Path) -> None:
    change_config(adapter, lora_alpha=0, alpha_pattern={})
    ids = np.arange(40, 80)
    with load(tiny(4), threads=1) as plain, load(tiny(4), threads=1, adapters={"zero": adapter}) as model:
        expected = plain.logits(ids)
        np.testing.assert_array_equal(model.logits(ids), expected)
        np.testing.assert_array_equal(model.logits(ids, adapter="zero"), expected)


def test_a_models_adapters_are_told(mixed: Model) -> None:
    adapter = mixed.adapters["all"]
    assert repr(mixed.adapters) == "<Adapters: all, attention, one>"
    assert "all: rank 20" in repr(adapter)
    assert mixed.adapters.nbytes == sum(adapter.nbytes for adapter in mixed.adapters.values())
    assert adapter.nbytes > 20 * 2 * 2 * (4 * 72 + 256 + 100)
    assert len({adapter.fingerprint for adapter in mixed.adapters.values()}) == 3


def test_memory_for_adapters_is_checked(
    tiny: Callable[[int], Path], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npqwen.engine.adapter.available_memory", lambda: 1000)
    with pytest.raises(npqwen.OutOfMemoryError, match=r"the adapter a needs 140 kB of memory and 1 kB are available"):
        load(tiny(4), adapters={"a": adapter})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({B: None}, "only one of the two factors"),
        ({B: np.zeros((500, 3), np.float32)}, "with shape [500, 256], but the model's is [512, 256]"),
        ({B: np.full((512, 3), np.nan, np.float32)}, "holds NaN or infinity; the adapter is broken"),
        ({B: np.full((512, 3), 3e38, np.float32)}, "multiply to about inf at its scale of 1.66667; the"),
        (
            {B: np.full((512, 3), 1e30, np.float32), B.replace("_B", "_A"): np.full((3, 256), 1e30, np.float32)},
            "has factors that multiply to about 5e+60",
        ),
        ({B.replace("_B", "_A"): np.full((3, 256), 1e7, np.float32)}, "or the scale too large"),
        ({B: np.zeros((512, 3), np.int8)}, "is stored as I8"),
        (
            {
                B.replace("layers.1", "layers.9"): np.zeros((512, 3), np.float32),
                B.replace("layers.1", "layers.9").replace("lora_B", "lora_A"): np.zeros((3, 256), np.float32),
            },
            "adapts model.layers.9.self_attn.q_proj.weight, which the model lacks; is it of another model?",
        ),
        (
            {
                B.replace("q_proj", "qkv_proj"): np.zeros((512, 3), np.float32),
                B.replace("q_proj", "qkv_proj").replace("lora_B", "lora_A"): np.zeros((3, 256), np.float32),
            },
            "adapts model.layers.1.self_attn.qkv_proj.weight, which the model lacks",
        ),
        (
            {"base_model.model.model.norm.weight": np.zeros(256, np.float32)},
            "replaces model.norm.weight, which is only possible when it is merged into the model: "
            "npqwen convert MODEL OUT --adapter",
        ),
    ],
)
def test_adapters_of_other_models_and_damaged_ones_are_refused(
    tiny: Callable[[int], Path], adapter: Path, changes: dict[str, Any], problem: str
) -> None:
    change_tensors(adapter, changes)
    with pytest.raises(npqwen.CheckpointError) as error:
        load(tiny(4), adapters={"a": adapter})
    assert problem in str(error.value)


def test_adapters_of_the_embedding_have_to_be_merged(tiny: Callable[[int], Path]) -> None:
    with pytest.raises(npqwen.CheckpointError, match=r"embed_tokens\.weight.*npqwen convert MODEL OUT --adapter"):
        load(tiny(4), adapters={"a": ADAPTERS / "embedding"})


def test_dora_is_refused_by_name(tiny: Callable[[int], Path], adapter: Path) -> None:
    change_config(adapter, use_dora=True)
    with pytest.raises(npqwen.CheckpointError, match="uses DoRA, which is not supported; merge it in PEFT"):
        load(tiny(4), adapters={"a": adapter})


def test_names_and_paths_are_checked(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    for wrong in ({"a b": "x"}, {"": "x"}, {3: "x"}, {"a:b": "x"}):
        with pytest.raises(npqwen.OptionError, match="an adapter cannot be called"):
            load(tiny(4), adapters=wrong)  # type: ignore[arg-type]
    with pytest.raises(npqwen.OptionError, match="adapters is 'x'; give a dictionary of names and directories"):
        load(tiny(4), adapters="x")  # type: ignore[arg-type]
    with pytest.raises(npqwen.ModelNotFoundError, match="is not a directory"):
        load(tiny(4), adapters={"a": tmp_path / "none"})


def test_unknown_adapters_are_refused_by_name(mixed: Model, tiny_model: Model) -> None:
    message = "unknown adapter 'some'; the model was loaded with all, attention, one"
    with pytest.raises(npqwen.OptionError, match=message):
        mixed.new_cache(adapter="some")
    with pytest.raises(npqwen.OptionError, match="loaded without adapters; load it with adapters="):
        tiny_model.logits([1], adapter="some")
