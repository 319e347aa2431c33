"""The models that hostile ones are made of: small enough for a command to take milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import TINY, make_config, random_tensors, write_checkpoint
from npqwen_quant import convert

BYTES, MERGED = 256, 64
"""Tokens of a byte, and of merges, that the tokenizer has before its added tokens."""
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""A token has 8 of 16 experts, as in the real mixtures."""
DENSE, SPARSE = ("dense-3", "dense-4", "dense-8", "dense-16"), ("mixture-3", "mixture-4", "mixture-8", "mixture-16")
"""The converted models; their checkpoints are `dense` and `mixture`."""


def make_bases(directory: Path) -> None:
    """Write the checkpoints, dense in one file, as a mixture and in shards, and convert them with all numbers of bits.

    The first conversions of a process, they also load the converter's compiled code.
    """
    tokenizer = small_tokenizer()
    size = BYTES + MERGED + len(tokenizer["added_tokens"])
    for name, changes in (("dense", {}), ("mixture", MIXTURE), ("shards", {})):
        config = make_config(vocab_size=size, max_position_embeddings=1024, head_dim=16, **changes)
        config |= {"bos_token_id": size - 26, "eos_token_id": size - 24}
        write_checkpoint(directory / name, config, random_tensors(config), shards=3 if name == "shards" else 1)
        (directory / name / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        generation = {"do_sample": True, "eos_token_id": [size - 24, size - 26], "temperature": 0.6, "top_k": 20}
        (directory / name / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        settings = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
        del settings["added_tokens_decoder"]
        (directory / name / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for made in (*DENSE, *SPARSE):
        source, _, bits = made.partition("-")
        convert(directory / source, directory / made, bits=int(bits))


def small_tokenizer() -> dict[str, Any]:
    """The example model's tokenizer with its first merges only."""
    tokenizer: dict[str, Any] = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < BYTES + MERGED}
    model["merges"] = model["merges"][:MERGED]
    for n, added in enumerate(tokenizer["added_tokens"]):
        added["id"] = BYTES + MERGED + n
    return tokenizer
