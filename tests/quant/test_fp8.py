"""FP8 checkpoints: what their tensors mean, whole conversions, and what is refused."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, to_bf16, write_safetensors
from npqwen_quant import convert
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.fp8 import E4M3
from quantizers import E4M3 as MEANT
from quantizers import MOE, check_conversion, check_tensors, example, fp8, write_quantized

from npqwen.errors import CheckpointError

NAME = "model.layers.1.self_attn.k_proj"


def configured(block: Any = (16, 24), **changes: Any) -> dict[str, Any]:
    size = list(block) if isinstance(block, tuple) else block
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": size}
    return make_config(quantization_config=entry, **changes)


def write(directory: Path, **changes: Any) -> dict[str, np.ndarray]:
    config = configured(**changes)
    return write_quantized(directory, config, random_tensors(config), lambda w: fp8(w, (16, 24)))


def test_every_byte_has_its_value() -> None:
    np.testing.assert_array_equal(E4M3, MEANT)
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [127, 255]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("block", "changes", "shards"),
    [
        ((16, 24), {}, 1),
        ((128, 128), {"tie_word_embeddings": False}, 3),
        ((7, 5), MIXTURE, 2),
        ((1, 1000), {}, 1),
    ],
)
def test_tensors(tmp_path: Path, block: tuple[int, int], changes: dict[str, Any], shards: int, bf16: bool) -> None:
    config = configured(block, **changes)
    meant = write_quantized(tmp_path, config, random_tensors(config), lambda w: fp8(w, block, bf16), shards=shards)
    check_tensors(tmp_path, meant)


def test_one_scale_for_a_matrix_or_a_row(tmp_path: Path) -> None:
    for shape in ((), (1,)):
        config = configured(None)

        def quantizer(w: np.ndarray, shape: tuple[int, ...] = shape) -> Any:
            parts, meant = fp8(w, w.shape)
            parts["weight_scale"] = parts.pop("weight_scale_inv").reshape(shape)
            return parts | dict.fromkeys(("input_scale", "output_scale"), np.ones(1, np.float32)), meant

        check_tensors(tmp_path, write_quantized(tmp_path, config, random_tensors(config), quantizer))


def test_blocks_larger_than_the_matrix_take_no_memory(tmp_path: Path) -> None:
    config = configured((1, 1 << 20))
    meant = write_quantized(tmp_path, config, random_tensors(config), lambda w: fp8(w, (1, w.shape[1])))
    tracemalloc.start()
    try:
        check_tensors(tmp_path, meant)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_names_of_a_bare_base_model(tmp_path: Path) -> None:
    config = configured()
    meant = write_quantized(
        tmp_path,
        config,
        random_tensors(config),
        lambda w: fp8(w, (16, 24)),
        rename=lambda name: name.removeprefix("model."),
    )
    check_tensors(tmp_path, meant)


@pytest.mark.parametrize("source", [None, MOE], ids=["dense", "mixture"])
def test_conversion(tmp_path: Path, source: Path | None) -> None:
    config, tensors = example() if source is None else example(source)
    config["quantization_config"] = configured((128, 128))["quantization_config"]
    meant = write_quantized(tmp_path / "in", config, tensors, fp8, tokenizer=True)
    check_conversion(tmp_path / "in", tmp_path / "out", meant)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "npqwen"


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write(tmp_path / "in")
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "in", tmp_path / "out", progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def changed(edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """A function that writes the checkpoint with some stored tensors changed."""

    def prepare(directory: Path) -> None:
        config = configured()
        stored: dict[str, np.ndarray] = {}
        for name, values in random_tensors(config).items():
            if values.ndim == 1 or "embed" in name:
                stored[name] = to_bf16(values)
            else:
                stored |= {name.removesuffix("weight") + end: part for end, part in fp8(values, (16, 24))[0].items()}
        edit(stored)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        write_safetensors(directory / "model.safetensors", stored, "F32")

    return prepare


def with_block(block: Any) -> Callable[[Path], None]:
    def prepare(directory: Path) -> None:
        write(directory)
        (directory / "config.json").write_text(json.dumps(configured(block)))

    return prepare


SCALES = f"{NAME}.weight_scale_inv"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scales": (changed(lambda t: t.pop(SCALES)), f"{NAME}.weight is stored as F8_E4M3 without its scales"),
    "no weights": (changed(lambda t: t.pop(f"{NAME}.weight")), f"{SCALES}, but no weights in F8_E4M3"),
    "plain weights with scales": (
        changed(lambda t: t.update({f"{NAME}.weight": np.ones((64, 72), np.float32)})),
        f"{SCALES}, but no weights in F8_E4M3",
    ),
    "scales of another shape": (
        changed(lambda t: t.update({SCALES: np.ones((4, 4), np.float32)})),
        r"have shape \[4, 4\]; for a matrix of 64 x 72 it must be \[4, 3\]",
    ),
    "scales in a vector": (changed(lambda t: t.update({SCALES: np.ones(12, np.float32)})), r"have shape \[12\]"),
    "scales of another dtype": (changed(lambda t: t.update({SCALES: np.ones((4, 3), np.int64)})), "stored as I64"),
    "weights of three dimensions": (
        changed(lambda t: t.update({f"{NAME}.weight": np.ones((4, 16, 72), np.uint8)})),
        r"has shape \[4, 16, 72\], not that of a matrix",
    ),
    "no weights at all": (
        changed(lambda t: t.update({f"{NAME}.weight": np.ones((0, 72), np.uint8)})),
        r"has shape \[0, 72\], not that of a matrix",
    ),
    "nan weights": (changed(lambda t: t[f"{NAME}.weight"].__setitem__((3, 4), 0x7F)), f"{NAME}.weight holds NaN"),
    "nan scales": (changed(lambda t: t[SCALES].__setitem__((1, 1), np.nan)), f"{NAME}.weight holds NaN"),
    "infinite scales": (changed(lambda t: t[SCALES].__setitem__((1, 1), np.inf)), f"{NAME}.weight holds NaN"),
    "overflow": (changed(lambda t: t[SCALES].__setitem__((1, 1), 3e38)), f"{NAME}.weight holds NaN"),
    **{
        f"block of {block}": (with_block(block), "weight_block_size is .*, not the rows and columns of a block")
        for block in ([0, 128], [128], [-1, 128], ["128", "128"], "128", [1.5, 2], [True, True], 128, [10**30, 1])
    },
    "blocks of another size": (with_block((64, 64)), "the scales of .* have shape"),
    "no blocks": (with_block(None), "the scales of .* have shape"),
}


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str, bits: int) -> None:
    prepare, message = REFUSED[case]
    prepare(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out", bits)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "in")
    tensor = Checkpoint(tmp_path / "in").tensors[f"{NAME}.weight"]
    os.truncate(tmp_path / "in" / "model.safetensors", 4000)
    with pytest.raises(CheckpointError, match="shorter"):
        tensor.read(0, 4)
