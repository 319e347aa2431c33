"""An embedding model and a reranker made of the example model, with the files of Qwen's, and texts for them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import TINY, read_safetensors, write_safetensors

if TYPE_CHECKING:
    from npqwen.model import Model

CONTEXT = 512
"""Of the models that made data/retrieval.npz."""

INSTRUCTION = "Given a word, retrieve its definition"
YES, NO = 2753, 2152
"""The example model's vocabulary has no token for "yes"."""

DEFINITIONS = (
    "decade (noun): a period of 10 years.",
    "anger (noun): a strong emotion; a feeling that is oriented toward some real or supposed grievance.",
    "part (noun): something determined in relation to something that includes it.",
    "river (noun): a large natural stream of water (larger than a creek).",
    "knife (noun): edge tool used as a cutting instrument; has a pointed blade with a sharp edge and a handle.",
    "winter (noun): the coldest season of the year; in the northern hemisphere it extends from the winter solstice to "
    "the vernal equinox.",
    "honest (adjective): marked by truth.",
    "the sum of 17 and 25 is 42",
    "",
    "München liegt an der Isar, 上海在黄浦江边。",
    "A bridge carries a road over a river. " * 20,
    "one two three four five six seven eight nine ten " * 60,
)
QUERIES = (
    "ten years", "stream of water", "What is the meaning of anger?", "tool to cut bread", "cold season", "truth",
    "17 + 25", "city in Bavaria",
)  # fmt: skip


def embedding_checkpoint(directory: Path, *, ending: bool = True, **pooling: Any) -> Path:
    """The example model with the names of tensors and the files of Qwen3-Embedding.

    ending: whether tokenizer.json appends <|endoftext|>. pooling: changes of 1_Pooling/config.json.
    """
    directory.mkdir(parents=True)
    tensors = read_safetensors(TINY / "model.safetensors")
    write_safetensors(
        directory / "model.safetensors", {name.removeprefix("model."): value for name, value in tensors.items()}
    )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    if ending:
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [4096], "tokens": ["<|endoftext|>"]}},
        }
        processors = [tokenizer["post_processor"], template]
        tokenizer["post_processor"] = {"type": "Sequence", "processors": processors}
    write_json(directory / "tokenizer.json", tokenizer)
    kinds = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    modes = {f"pooling_mode_{kind}": kind == "lasttoken" for kind in kinds}
    (directory / "1_Pooling").mkdir()
    write_json(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 256, **modes, "include_prompt": True, **pooling},
    )
    write_json(
        directory / "config_sentence_transformers.json",
        {
            "prompts": {"query": f"Instruct: {INSTRUCTION}\nQuery:", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    types = ("Transformer", "Pooling", "Normalize")
    write_json(
        directory / "modules.json",
        [
            {"idx": at, "path": f"{at}_{kind}" if at else "", "type": f"sentence_transformers.models.{kind}"}
            for at, kind in enumerate(types)
        ],
    )
    return directory


def reranker_checkpoint(directory: Path) -> Path:
    """The example model with the file that tells a reranker and its answers."""
    directory.mkdir(parents=True)
    for path in TINY.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (directory / path.name).write_bytes(path.read_bytes())
    (directory / "1_LogitScore").mkdir()
    write_json(directory / "1_LogitScore" / "config.json", {"true_token_id": YES, "false_token_id": NO})
    return directory


class Shelf(ExitStack):
    """Loads a checkpoint in any encoding, once, and closes what it has loaded."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self._source = source
        self._models: dict[int, Model] = {}

    def model(self, bits: int) -> Model:
        from npqwen_quant import convert

        from npqwen.model import load

        if bits not in self._models:
            path = self._source.with_name(f"bits-{bits}")
            convert(self._source, path, bits=bits)
            self._models[bits] = self.enter_context(load(path, threads=2, context=CONTEXT))
        return self._models[bits]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
