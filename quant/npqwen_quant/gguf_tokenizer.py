"""tokenizer.json and tokenizer_config.json of a model, from the metadata of its GGUF file.

A GGUF file has the tokens, their types and the merges; the rest of Qwen's tokenizer.json (normalizer, pre-tokenizer,
decoder) follows from `tokenizer.ggml.pre`. Texts get the same ids as with the original tokenizer, and templates render
the same. Whatever a GGUF file does not specify is as in Qwen's own tokenizers: spaces beside added tokens are kept, and
a template sees `bos_token` only if texts are to begin with it.
"""

from __future__ import annotations

import json
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import quoted
from npqwen_quant.gguf_config import Metadata

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (  # marks that combine with letters belong to words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "qwen35": _QWEN35}
"""The patterns of Qwen's pre-tokenizers, by values of `tokenizer.ggml.pre`."""
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Types of tokens. Rows of the embedding without a token are _UNUSED, named [PADn]."""

_TEXT = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""Added tokens that are not special. llama.cpp's converter marks them as control tokens because of their looks
(`does_token_look_special`), so that their type in a GGUF file does not tell."""

_TEMPLATE = "tokenizer.chat_template"


class GgufTokenizer:
    """The tokenizer of a file: `tokens`, by id, and the tokenizer files made from it."""

    def __init__(self, metadata: Metadata, vocab_size: int) -> None:
        """vocab_size: rows of the embedding. CheckpointError for a tokenizer that is not Qwen's, or is damaged."""
        self._metadata = metadata
        model, pre = metadata.get("tokenizer.ggml.model", str), metadata.get("tokenizer.ggml.pre", str)
        if model != "gpt2" or pre not in _PATTERNS:
            raise CheckpointError(
                f"{metadata.path} has the tokenizer {quoted(model)} with {quoted(pre)}; Qwen3's is 'gpt2' with 'qwen2'"
            )
        self._pattern = _PATTERNS[pre]
        self.tokens: list[str] = self._list("tokens", str)
        self._types: list[int] = self._list("token_type", int)
        self._merges: list[str] = self._list("merges", str)
        if not self.tokens or len(self._types) != len(self.tokens):
            raise CheckpointError(
                f"{metadata.path} has {len(self.tokens)} tokens and {len(self._types)} token types; "
                "there must be a type for each token, and at least one token"
            )
        if len(self.tokens) > vocab_size:
            raise CheckpointError(f"{metadata.path} has {len(self.tokens)} tokens, but an embedding of {vocab_size}")

    def tokenizer_json(self) -> bytes:
        """The content of tokenizer.json. CheckpointError for tokens or merges that fit no byte-level BPE."""
        vocabulary: dict[str, int] = {}
        added = []
        for id, (token, kind) in enumerate(zip(self.tokens, self._types, strict=True)):
            if not token:
                raise self._wrong("a token without text")
            if kind == _NORMAL:
                if token in vocabulary:
                    raise self._wrong(f"the token {quoted(token)} twice")
                vocabulary[token] = id
            elif kind in (_CONTROL, _USER_DEFINED):
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                special = kind == _CONTROL and token not in _TEXT
                added.append({"id": id, "content": token, **flags, "special": special})
            elif kind != _UNUSED:
                raise self._wrong(f"a token of type {kind}, which Qwen's tokenizer does not have")
        if len({entry["content"] for entry in added} | vocabulary.keys()) < len(added) + len(vocabulary):
            raise self._wrong("an added token twice")
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": self._pattern}, "behavior": "Isolated", "invert": False},
                    _BYTE_LEVEL,
                ],
            },
            "post_processor": _BYTE_LEVEL,
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": self._pairs(vocabulary),
            },
        }
        return json.dumps(document, ensure_ascii=False).encode()

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: chat templates, and the special tokens that they see."""
        begins = self._metadata.get("tokenizer.ggml.add_bos_token", bool, False)
        found: dict[str, Any] = {
            "add_bos_token": begins,
            "bos_token": self._special("bos") if begins else None,
            "eos_token": self._special("eos"),
            "pad_token": self._special("padding"),
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": self._special("unknown"),
        }
        templates = self.templates()
        if templates:
            only = list(templates) == ["default"]
            named = [{"name": name, "template": text} for name, text in templates.items()]
            found["chat_template"] = templates["default"] if only else named
        return found

    def templates(self) -> dict[str, str]:
        """The chat templates by name; the nameless one is "default"."""
        found = {}
        for key in self._metadata.entries:
            if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
                found[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = self._metadata.get(key, str)
        return found

    def _pairs(self, vocabulary: dict[str, int]) -> list[list[str]]:
        pairs = []
        for merge in self._merges:
            pair = merge.split(" ")
            if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
                raise self._wrong(f"the merge {quoted(merge)}, which does not join two tokens to a third")
            pairs.append(pair)
        return pairs

    def _special(self, kind: str) -> str | None:
        id = self._metadata.get(f"tokenizer.ggml.{kind}_token_id", int)
        if id is None:
            return None
        if not 0 <= id < len(self.tokens):
            raise self._wrong(f"{kind}_token_id {id}, beyond its {len(self.tokens)} tokens")
        return str(self.tokens[id])

    def _list(self, name: str, kind: type) -> list[Any]:
        found: list[Any] = self._metadata.get(f"tokenizer.ggml.{name}", list, [])
        if found and type(found[0]) is not kind:
            raise self._wrong(f"{name} of the wrong type")
        return found

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._metadata.path} has {what}; it is damaged")
