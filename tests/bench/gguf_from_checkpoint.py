#!/usr/bin/env python3
"""Convert a Hugging Face Qwen3 checkpoint to GGUF, so that llama.cpp and npqwen can run the same weights.

    python tests/bench/gguf_from_checkpoint.py CHECKPOINT OUT.gguf --type q4_0 [--pure]

The `gguf` package writes bf16 and f16, tensor by tensor; llama.cpp's own quantizer makes q4_0 and q8_0 from them, by
its default recipe (with Q4_0, a tied embedding becomes Q6_K) or with every matrix in one format (--pure). Dense and
MoE models; Qwen3's rotary embedding needs no reordering of q and k. Needs `pip install npqwen[bench]`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from hybrid_tensors import ARCHITECTURES as HYBRIDS
from hybrid_tensors import Target, targets

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe", **HYBRIDS}
EXACT = (".ffn_gate_inp.", ".ffn_gate_inp_shexp.", ".ssm_conv1d.")
"""Matrices that llama.cpp keeps in f32: the router, and the convolution of Gated DeltaNet."""
FLOATS = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "f16": gguf.GGMLQuantizationType.F16,
}
FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "q3_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "q3_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "iq3_s": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
    "iq3_m": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_M,
}
# ggml's number of each tensor format, for --pure's embedding and output matrix.
TENSOR_TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
SOURCE_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(\w+\.weight)")

# llama.cpp logs to one C callback per process, which must outlive every call.
_LOG: deque[str] = deque(maxlen=5)


def _log(level: int, text: bytes, user_data: object) -> None:
    _LOG.append(text.decode("utf-8", "replace"))


_LOGGER = llama_cpp.llama_log_callback(_log)


@dataclass(frozen=True)
class Source:
    """One tensor of a safetensors file."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> npt.NDArray[Any]:
        """The stored values, memory-mapped; bf16 as uint16."""
        dtype = SOURCE_DTYPES[self.dtype]
        return np.memmap(self.path, dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    stack: list[Source]
    """One, or one per expert for the experts' matrices."""
    made: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda values: values
    """Its values, or an expert's part of them, of a source's in the type in which they are stored."""

    def is_exact(self) -> bool:
        """Whether llama.cpp keeps it in f32."""
        return len(self.shape) == 1 or any(part in self.name for part in EXACT)

    def read(self, kind: str) -> npt.NDArray[Any]:
        """The values as "f32", "f16" or (their 16 bits) "bf16"."""
        arrays = [self.made(encode(source.read(), source.dtype, kind)) for source in self.stack]
        return arrays[0].reshape(self.shape) if len(arrays) == 1 else np.stack(arrays)


def sources(checkpoint: Path) -> dict[str, Source]:
    """Every tensor of a checkpoint's safetensors files, by name."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + size + entry["data_offsets"][0]
            found[name] = Source(path, start, entry["dtype"], tuple(entry["shape"]))
    if not found:
        raise SystemExit(f"{checkpoint} holds no .safetensors files; give a Hugging Face checkpoint directory")
    return found


def encode(values: npt.NDArray[Any], dtype: str, kind: str) -> npt.NDArray[Any]:
    """Values of safetensors type `dtype` as "f32", "f16" or (its 16 bits) "bf16"."""
    if (dtype, kind) in {("BF16", "bf16"), ("F16", "f16"), ("F32", "f32")}:
        return values
    out = np.empty(values.shape, {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[kind])
    step = max(1, (1 << 22) // max(1, values[0].size))
    for row in range(0, len(values), step):
        part = values[row : row + step]
        single = (part.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else part.astype(np.float32)
        if kind == "bf16":
            bits = single.view(np.uint32)
            bits += 0x7FFF + (bits >> 16 & 1)  # round to nearest, ties to even
            out[row : row + step] = bits >> 16
        else:
            out[row : row + step] = single
    return out


def tensors(found: dict[str, Source], config: dict[str, Any]) -> list[Tensor]:
    """All tensors of a model's GGUF file. config: that of the text model in config.json."""
    return list(hybrid_tensors(found, config) if config["model_type"] in HYBRIDS else plain_tensors(found, config))


def plain_tensors(found: dict[str, Source], config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of a Qwen3 model, dense or MoE."""
    arch = gguf.MODEL_ARCH.QWEN3MOE if config["model_type"] == "qwen3_moe" else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    stacks: dict[str, dict[int, Source]] = {}
    for name, source in found.items():
        match = EXPERT.fullmatch(name)
        key = match[1] + match[3] if match else name
        stacks.setdefault(key, {})[int(match[2]) if match else 0] = source
    for name, stack in stacks.items():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise SystemExit(f"{name} is not a tensor of a Qwen3 model; is this a checkpoint of another architecture?")
        shape = stack[0].shape if len(stack) == 1 else (len(stack), *stack[0].shape)
        yield Tensor(target, shape, [stack[index] for index in range(len(stack))])


def hybrid_tensors(found: dict[str, Source], config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of a Qwen3-Next or Qwen3.5 model."""
    stacks: dict[str, dict[int, tuple[Target, Source]]] = {}
    for name, source in found.items():
        try:
            made = targets(name, source.shape, config)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        for target in made:
            if target.expert is None:
                yield Tensor(target.name, target.shape, [source], target.made)
            else:
                stacks.setdefault(target.name, {})[target.expert] = target, source
    for name, stack in stacks.items():
        target, _ = stack[0]
        yield Tensor(name, (len(stack), *target.shape), [stack[index][1] for index in range(len(stack))], target.made)


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    """The model's dimensions, from its config.json."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if "intermediate_size" in config:
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(theta))
    if rope.get("rope_type", rope.get("type", "default")) == "yarn":
        original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(original)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] in HYBRIDS:
        add_hybrid_metadata(writer, config, rope)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_hybrid_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """The dimensions that only hybrids have. rope: parameters of the rotary embedding."""
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    if "layer_types" in config:
        recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    writer.add_rope_dimension_count(int(config["head_dim"] * share))
    if config["model_type"] != "qwen3_next":
        writer.add_rope_dimension_sections([*rope.get("mrope_section", (11, 11, 10)), 0])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE of tokenizer.json; embedding rows beyond it are named [PADn], as llama.cpp's do."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * config["vocab_size"]
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = special
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35" if config["model_type"].startswith("qwen3_5") else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if config["bos_token_id"] is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    if isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


def write_float(checkpoint: Path, out: Path, kind: str = "bf16") -> None:
    """Write `out`, matrices in `kind` ("bf16" or "f16"), vectors in f32. Takes the memory of one tensor."""
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = raw.get("text_config", raw)
    if config["model_type"] not in ARCHITECTURES:
        raise SystemExit(f"{checkpoint} is of type {config['model_type']}, not of {', '.join(ARCHITECTURES)}")
    plan = tensors(sources(checkpoint), config)
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURES[config["model_type"]])
    add_metadata(writer, config, kind)
    add_tokenizer(writer, checkpoint, config)
    for tensor in plan:
        stored = gguf.GGMLQuantizationType.F32 if tensor.is_exact() else FLOATS[kind]
        size = int(np.prod(tensor.shape)) * (4 if tensor.is_exact() else 2)
        dtype = np.dtype(np.float32 if tensor.is_exact() else np.float16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan:
        writer.write_tensor_data(tensor.read("f32" if tensor.is_exact() else kind))
    writer.close()
    part.replace(out)


def quantize(
    source: Path,
    out: Path,
    kind: str,
    *,
    pure: bool = False,
    threads: int = 0,
    importances: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> float:
    """Quantize a float GGUF with llama.cpp; returns the seconds it took.

    threads: 0 means all. importances: of each column of a matrix, by GGUF names (one row for each expert of a stack):
    what llama.cpp calls an importance matrix.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FILE_TYPES[kind]
    options.nthread = threads
    options.pure = pure
    if pure:
        options.token_embedding_type = options.output_tensor_type = TENSOR_TYPES[kind]
    entries = None
    if importances:
        arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in importances.items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # an entry without a name is the last
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = entries
    part = out.with_name(out.name + ".part")
    llama_cpp.llama_log_set(_LOGGER, ctypes.c_void_p(0))
    start = time.perf_counter()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options))
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"llama.cpp's quantizer failed on {source}:\n{''.join(_LOG)}")
    part.replace(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, default="bf16")
    parser.add_argument("--pure", action="store_true", help="every matrix in one format")
    parser.add_argument("--threads", type=int, default=0, help="threads of the quantizer (all)")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if options.type in FLOATS:
        write_float(options.checkpoint, options.out, options.type)
    else:
        between = options.out.with_suffix(".bf16.gguf")
        write_float(options.checkpoint, between, "bf16")
        print(f"{between}  {time.perf_counter() - start:.1f} s", file=sys.stderr)
        seconds = quantize(between, options.out, options.type, pure=options.pure, threads=options.threads)
        print(f"llama.cpp's quantizer took {seconds:.1f} s", file=sys.stderr)
        between.unlink()
    print(f"{options.out}  {options.out.stat().st_size / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
