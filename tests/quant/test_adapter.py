"""LoRA adapters merged in conversion: held to PEFT's logits, and to plain NumPy for what PEFT's files here lack."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, make_config, random_tensors, write_checkpoint
from npqwen_quant import convert
from npqwen_quant.adapter import AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.unquantized import final_states, logits
from retrieval_checkpoints import embedding_checkpoint
from safetensors.numpy import load_file, save_file

import npqwen

DATA = Path(__file__).parents[1] / "data"
ADAPTERS = DATA / "adapters"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def peft() -> dict[str, Any]:
    return dict(np.load(DATA / "adapters.npz"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the adapter of linear layers, to be changed."""
    return Path(shutil.copytree(ADAPTERS / "linear", tmp_path / "adapter"))


def weights(name: str, *adapters: AdapterFile) -> Any:
    tensor = Checkpoint(TINY, adapters=adapters).tensors[name]
    return tensor.floats(0, tensor.shape[0])


def change(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_logits_are_pefts(peft: dict[str, Any], name: str) -> None:
    """Ranks and alphas by pattern; rsLoRA, embedding, output matrix and norms of a model whose embedding was tied."""
    checkpoint = Checkpoint(TINY, adapters=[AdapterFile(ADAPTERS / name)])
    (hidden,) = final_states(checkpoint, peft["ids"][None])
    np.testing.assert_allclose(logits(checkpoint, hidden), peft[name], atol=2e-3)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_a_model_converted_with_it_says_what_peft_says(peft: dict[str, Any], name: str, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "model", bits=16, adapters=[AdapterFile(ADAPTERS / name)])
    with npqwen.load(tmp_path / "model", threads=1) as model:
        found = model.logits(peft["ids"])
    assert np.abs(found - peft[name]).max() < 0.02 * np.abs(peft[name]).max()  # weights are rounded to bf16
    assert (found.argmax(1) == peft[name].argmax(1)).mean() > 0.9


def test_several_adapters_add_up_and_each_has_a_strength() -> None:
    one, two = AdapterFile(ADAPTERS / "linear", 0.5), AdapterFile(ADAPTERS / "linear", -2.0)
    plain = weights(Q_PROJ)
    tensors = load_file(ADAPTERS / "linear" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{Q_PROJ[:-7]}.lora_{factor}.weight"] for factor in "AB")
    assert a.shape[0] == 3
    product = b.astype(np.float64) @ a * 5 / 3
    np.testing.assert_allclose(weights(Q_PROJ, one), plain + 0.5 * product, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights(Q_PROJ, one, two), plain - 1.5 * product, rtol=1e-5, atol=1e-6)
    other = Q_PROJ.replace("1", "0")  # a layer without factors
    assert np.array_equal(weights(other, one), weights(other))


def test_an_adapter_of_a_base_model_without_head_is_merged_by_its_shorter_names(adapter: Path, tmp_path: Path) -> None:
    change(adapter, alpha_pattern={"layers.1.self_attn.q_proj": 7})
    merged = weights(Q_PROJ, AdapterFile(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    short = {name.replace("base_model.model.model.", "base_model.model."): one for name, one in tensors.items()}
    save_file(short, adapter / "adapter_model.safetensors")
    assert np.array_equal(weights(Q_PROJ, AdapterFile(adapter)), merged)
    embedding = Checkpoint(embedding_checkpoint(tmp_path / "embedding"), adapters=[AdapterFile(adapter)])
    assert np.array_equal(embedding.tensors[Q_PROJ].floats(0, len(merged)), merged)
    output = {f"base_model.model.lm_head.lora_{factor}.weight": np.ones(shape, np.float32)
              for factor, shape in (("A", (2, 256)), ("B", (4128, 2)))}  # fmt: skip
    save_file(output, adapter / "adapter_model.safetensors")
    assert np.abs(weights("lm_head.weight", AdapterFile(adapter)) - weights("model.embed_tokens.weight")).min() > 1


def test_rows_do_not_depend_on_how_many_are_read_at_once() -> None:
    for file, name in (("linear", Q_PROJ), ("embedding", "model.embed_tokens.weight"), ("embedding", "lm_head.weight")):
        tensor = Checkpoint(TINY, adapters=[AdapterFile(ADAPTERS / file)]).tensors[name]
        whole = tensor.floats(0, tensor.shape[0])
        for first, count in ((0, 1), (5, 16), (tensor.shape[0] - 3, 3)):
            assert np.array_equal(tensor.floats(first, count), whole[first : first + count])


def test_modules_that_were_saved_whole_replace_the_checkpoints(adapter: Path) -> None:
    embedding = np.random.default_rng(0).standard_normal((4128, 256), np.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    save_file(tensors, adapter / "adapter_model.safetensors")
    file = AdapterFile(adapter)
    assert np.array_equal(weights("model.embed_tokens.weight", file), embedding)
    assert np.array_equal(weights("lm_head.weight", file), weights("model.embed_tokens.weight"))
    checkpoint = Checkpoint(TINY, adapters=[file])
    assert not checkpoint.config.tie_word_embeddings
    assert checkpoint.raw_config["tie_word_embeddings"] is False


def test_the_command_merges_and_measures_against_the_merged_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("part (noun): something determined in relation to something that includes it. " * 20)
    adapter = f"{ADAPTERS / 'linear'}:0.5"
    out, _ = run("convert", TINY, tmp_path / "m", "--bits", 8, "--adapter", adapter, "--evaluate", tmp_path / "text")
    assert out == f"{tmp_path / 'm'}\n"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["evaluation"]["kl_divergence"] < 0.01
    convert(TINY, tmp_path / "other", bits=8, adapters=[AdapterFile(ADAPTERS / "linear", 0.5)])
    ours, same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("m", "other"))
    assert ours == same
    assert "give a directory OUT for it" in run("convert", TINY, "--adapter", adapter, status=2)[1]
    assert "without low_disk" in run("convert", TINY, tmp_path / "n", "--low-disk", "--adapter", adapter, status=2)[1]


def test_a_dry_run_counts_what_adapters_change(run: Run, tmp_path: Path) -> None:
    def told(*adapters: str) -> str:
        flags = [flag for adapter in adapters for flag in ("--adapter", str(ADAPTERS / adapter))]
        return run("convert", TINY, tmp_path / "m", "--bits", 16, "--dry-run", *flags)[0]

    assert "output" not in told("linear")
    assert "output" in told("linear", "embedding")  # a matrix of its own
    convert(TINY, tmp_path / "m", bits=16, adapters=[AdapterFile(ADAPTERS / "embedding")])
    nbytes = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert f"{nbytes / 1e6:.1f} MB" in told("embedding")
    assert "is not a directory" in run("convert", TINY, "m", "--dry-run", "--adapter", "none", status=2)[1]
    assert "a directory OUT for it" in run("convert", TINY, "--dry-run", "--adapter", ADAPTERS / "linear", status=2)[1]


def test_scales_of_the_command_line(tmp_path: Path) -> None:
    assert AdapterFile.parse("a/b") == AdapterFile(Path("a/b"))
    assert AdapterFile.parse("a/b:0.25") == AdapterFile(Path("a/b"), 0.25)
    assert AdapterFile.parse("a/b:-1") == AdapterFile(Path("a/b"), -1.0)
    assert AdapterFile.parse("C:/b") == AdapterFile(Path("C:/b"))
    (tmp_path / "x:2").mkdir()
    assert AdapterFile.parse(str(tmp_path / "x:2")) == AdapterFile(tmp_path / "x:2")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3', not LoRA"),
        ({"use_dora": True}, "uses DoRA, which is not supported; merge it in PEFT"),
        ({"trainable_token_indices": [1]}, "uses trained tokens"),
        ({"bias": "all"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "weights that the initialization 'pissa' has changed; merge it in PEFT"),
        ({"init_lora_weights": "pissa_niter_16"}, "weights that the initialization 'pissa_niter_16' has changed"),
        ({"init_lora_weights": "OLoRA"}, "is for weights that the initialization 'OLoRA' has changed"),
        ({"init_lora_weights": "corda"}, "is for weights that the initialization 'corda' has changed"),
        ({"init_lora_weights": "loftq"}, "is for weights that the initialization 'loftq' has changed"),
        ({"lora_alpha": "much"}, "has a lora_alpha of 'much'"),
        ({"lora_alpha": 10**400}, "its magnitude must be at most 1e+30"),
        ({"lora_alpha": -1e308}, "has a lora_alpha of -1e+308; its magnitude must be at most"),
        ({"lora_alpha": float("nan")}, "has a lora_alpha of nan; its magnitude must be at most"),
        ({"alpha_pattern": {"(": 2}}, "not a valid regular expression"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "'(a+)+b', which is not a simple regular expression"),
        ({"alpha_pattern": {"x" * 2001: 2}}, "which is not a simple regular expression"),
        ({"alpha_pattern": {".*" * 20 + "z": 2}}, "an alpha_pattern that takes too long to match"),
        ({"alpha_pattern": {"(.|.)" * 40 + "z": 2}}, "an alpha_pattern that takes too long to match"),
        ({"alpha_pattern": {f"x{n}": 2 for n in range(20_000)}}, "an alpha_pattern that takes too long to match"),
        ({"alpha_pattern": 3}, "alpha_pattern that is not an object"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(adapter: Path, values: dict[str, Any], problem: str) -> None:
    change(adapter, **values)
    with pytest.raises(npqwen.CheckpointError) as error:
        Checkpoint(TINY, adapters=[AdapterFile(adapter)])
    assert problem in str(error.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_where_training_of_the_factors_alone_began_does_not_matter(adapter: Path, start: Any) -> None:
    merged = weights(Q_PROJ, AdapterFile(adapter))
    change(adapter, init_lora_weights=start)
    assert np.array_equal(weights(Q_PROJ, AdapterFile(adapter)), merged)


A, B = (f"base_model.model.{Q_PROJ[:-7]}.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({B: None}, "only one of the two factors"),
        ({B: np.zeros((512, 7), np.float32)}, "which have no product"),
        ({B: np.zeros((500, 3), np.float32)}, "with shape [500, 256], but the checkpoint's is [512, 256]"),
        ({B: np.zeros((512, 3), np.int8)}, "is stored as I8"),
        ({B.replace("layers.1", "layers.9"): np.zeros((512, 3), np.float32)}, "only one of the two factors"),
        ({"base_model.model.model.layers.9.mlp.up_proj.weight": np.zeros((1, 1), np.float32)}, "the checkpoint lacks"),
        ({B.replace("lora_B.weight", "lora_magnitude_vector"): np.zeros(3, np.float32)}, "which is not supported"),
        (
            {B.removeprefix("base_model.model."): np.zeros((512, 3), np.float32)},
            "layers.1.self_attn.q_proj.weight twice",
        ),
        (
            {B: np.zeros((512, 600), np.float32), A: np.zeros((600, 256), np.float32)},
            "have rank 600, but it has only 512",
        ),
        ({"x" * 300: np.zeros(3, np.float32)}, "a name of 300 characters"),
    ],
)
def test_damaged_adapters_are_refused(adapter: Path, changes: dict[str, Any], problem: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors") | changes
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, adapter / "adapter_model.safetensors")
    with pytest.raises(npqwen.CheckpointError) as error:
        Checkpoint(TINY, adapters=[AdapterFile(adapter)])
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", "^model.layers.1.self_attn.q_proj", "self_attn.q_proj", r".*layers\.[0-9]+\..*", "k_proj|q_proj"),
        *(r"layers\.(0|1|2)\.(?:self_attn|mlp)\..+", r"\d+\.self_attn\.q_proj"),
    ],
)
def test_patterns_of_alpha_match_as_in_peft(adapter: Path, pattern: str) -> None:
    """The first that matches holds; PEFT's matching is `re.match(rf"(.*\\.)?({key})$", module)`."""
    before = weights(Q_PROJ)
    change(adapter, alpha_pattern={"_proj": 1000, "layers.0": 1000, pattern: 10, "q_proj$": 1000})
    assert re.match(rf"(.*\.)?({pattern})$", Q_PROJ[:-7])
    tensors = load_file(adapter / "adapter_model.safetensors")
    expected = before + tensors[B].astype(np.float64) @ tensors[A] * 10 / 3
    np.testing.assert_allclose(weights(Q_PROJ, AdapterFile(adapter)), expected, rtol=1e-5, atol=1e-5)


def test_weights_too_large_for_float32_are_one_error(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[A][:], tensors[B][5] = 10, 3e38
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(npqwen.CheckpointError, match=r"adapter_model.*q_proj.weight holds NaN or infinity"):
        convert(TINY, tmp_path / "model", bits=16, adapters=[AdapterFile(adapter)])


def test_an_adapted_output_matrix_of_a_checkpoint_without_embedding(adapter: Path, tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    rows, columns = tensors.pop("model.embed_tokens.weight").shape
    write_checkpoint(tmp_path / "broken", config, tensors)
    shapes = {"A": (2, columns), "B": (rows, 2)}
    factors = {f"base_model.model.lm_head.lora_{name}.weight": np.ones(shape, "f4") for name, shape in shapes.items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(npqwen.CheckpointError, match=r"adapts lm_head.weight, which the checkpoint lacks"):
        Checkpoint(tmp_path / "broken", adapters=[AdapterFile(adapter)])


def test_directories_that_hold_no_adapter(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(npqwen.ModelNotFoundError, match="is not a directory; --adapter takes one that PEFT has saved"):
        Checkpoint(TINY, adapters=[AdapterFile(tmp_path / "none")])
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(npqwen.CheckpointError, match="damaged or truncated"):
        Checkpoint(TINY, adapters=[AdapterFile(adapter)])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(npqwen.CheckpointError, match=r"adapter_model\.bin is not read"):
        Checkpoint(TINY, adapters=[AdapterFile(adapter)])
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(npqwen.CheckpointError, match="adapter_config"):
        Checkpoint(TINY, adapters=[AdapterFile(adapter)])
