#!/usr/bin/env python3
"""Write what llama.cpp makes of the tiny models, and of blocks of every format, into from-llama/.

    python -m pip install 'transformers>=5' torch sentencepiece gguf llama-cpp-python
    python tests/data/make_gguf.py LLAMA_CPP

LLAMA_CPP: a checkout of llama.cpp, for its convert_hf_to_gguf.py. `tiny-qwen3.header.gz`, `tiny-qwen3-moe.header.gz`:
all of its F16 and BF16 files but the tensors' data; and `next`, `qwen35` and `qwen35-moe` of the BF16 files of the
hybrids, whose digests are `NAME.sha256` in `llama.npz`. There are also: for the prompts `ids_k` of tiny-qwen3.npz
`greedy_k`, 48 further tokens by the F16 file; for 40 tokens of `ids-NAME` of hybrid.npz `greedy-NAME`, by an F32 file;
and for each format of quantized blocks NAME `NAME.blocks`, random bytes with finite scales, and `NAME.weights`, ggml's
float32 of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "bench"))
MODELS = {
    "tiny-qwen3": (HERE.parents[1] / "examples" / "tiny-qwen3", "f16"),
    "tiny-qwen3-moe": (HERE / "tiny-qwen3-moe", "bf16"),
}
HYBRIDS = ("next", "qwen35", "qwen35-moe")
# The converter knows pre-tokenizers by the ids that they give a text, so not those of small vocabularies.
CONVERTER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
pre = sys.argv.pop(1)
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
convert_hf_to_gguf.main()
"""
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
"""Where in a block its float16 numbers are."""


class _Traits(ctypes.Structure):
    """The beginning of ggml's struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def blocks(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Random blocks of every format, and the weights that ggml finds in them."""
    (library,) = Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    found = {}
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (512 // weights, nbytes), np.uint8)
        for at in halves:
            scales = rng.normal(0, 1, len(raw)) * 10.0 ** rng.integers(-8, 4, len(raw))  # subnormal ones, too
            raw[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
        if name == "MXFP4":
            raw[:, 0] = rng.integers(0, 140, len(raw))  # exponents
        out = np.empty((len(raw), weights), np.float32)
        traits = ggml.ggml_get_type_traits(int(kind)).contents
        assert (traits.blck_size, traits.type_size) == (weights, nbytes)
        traits.to_float(raw.ctypes.data, out.ctypes.data, out.size)
        found[f"{name}.blocks"], found[f"{name}.weights"] = raw, out
    return found


def greedy(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """llama.cpp's 48 most likely tokens after a prompt."""
    from engine import Llama

    llama = Llama(path, 2, 256, "off", False)
    llama.run(ids, every=False)
    found = []
    for _ in range(48):
        found.append(int(llama.logits(1)[0].argmax()))
        llama.run(np.array(found[-1:]), every=False)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("llama", type=Path)
    options = parser.parse_args()
    arrays = blocks(np.random.default_rng(18))
    (HERE / "from-llama").mkdir(exist_ok=True)

    def converted(checkpoint: Path, kind: str, pre: str, *more: str) -> Path:
        path = Path(place) / f"{checkpoint.name}-{kind}.gguf"
        convert = [sys.executable, "-c", CONVERTER, str(options.llama), pre, str(checkpoint)]
        subprocess.run([*convert, "--outtype", kind, "--outfile", str(path), *more], check=True)
        return path

    def keep_header(name: str, path: Path) -> None:
        header = path.read_bytes()[: gguf.GGUFReader(path).data_offset]
        (HERE / "from-llama" / f"{name}.header.gz").write_bytes(gzip.compress(header, mtime=0))

    with tempfile.TemporaryDirectory() as place:
        for name, (checkpoint, kind) in MODELS.items():
            keep_header(name, converted(checkpoint, kind, "qwen2"))
        prompts = np.load(HERE / "tiny-qwen3.npz")
        for key in (key for key in prompts if key.startswith("ids_")):
            arrays[key.replace("ids", "greedy")] = greedy(Path(place) / "tiny-qwen3-f16.gguf", prompts[key])
        texts = np.load(HERE / "hybrid.npz")
        for name in HYBRIDS:
            checkpoint = Path(shutil.copytree(HERE / "hybrid" / name, Path(place) / name))
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODELS["tiny-qwen3"][0] / file, checkpoint)
            path = converted(checkpoint, "bf16", "qwen35", "--no-mtp")
            keep_header(name, path)
            arrays[f"{name}.sha256"] = np.array(hashlib.sha256(path.read_bytes()).hexdigest())
            path = converted(checkpoint, "f32", "qwen35", "--no-mtp")
            arrays[f"greedy-{name}"] = greedy(path, texts[f"ids-{name}"][:40])
    np.savez_compressed(HERE / "from-llama" / "llama.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
