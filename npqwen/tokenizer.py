"""Text to token ids and back: a checkpoint's `tokenizer.json`, and incremental decoding."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from npqwen.checks import check_ids
from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.format.tokenizer_file import read_tokenizer
from npqwen.wording import quoted, shortened

Kept = TypeVar("Kept")
_BLANKS = re.compile(r"\s*")
_LONG = 1_000_000
"""Characters of a text that are encoded first, to see whether it is too long."""
_MERGED = 1000
"""Tokens by which a text may have fewer than its beginning: the cut may be within one."""
_BLANK = 9_000_000
"""The most whitespace characters in a row. With 10 million, the library panics, and prints to stderr on its own."""


def _byte_letters() -> dict[str, int]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte, mapped to that byte.

    Printable Latin-1 characters map to themselves; the other bytes are U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


class Tokenizer:
    """The byte-level BPE tokenizer of a Qwen3 checkpoint.

    Tokens such as <|im_end|> are *special*: `decode` leaves them out of the text. `<think>`, `<tool_call>` and other
    added tokens are not special: they are part of the text.
    """

    def __init__(self, tokenizer: _Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._missing: dict[int, NDArray[np.intp]] = {}
        self._kept: dict[Hashable, Any] = {}
        self._special_names: re.Pattern[str] | None = None
        self.added_ids = frozenset(self._added)
        """The ids of all added tokens, special or not."""
        self.special_ids = frozenset(id for id, token in self._added.items() if token.special)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read `directory/tokenizer.json`; CheckpointError if it is missing, damaged or not a byte-level BPE."""
        path = directory / "tokenizer.json"
        data = read_tokenizer(path)
        try:
            tokenizer = _Tokenizer.from_buffer(data)
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise CheckpointError(f"{path} cannot be read: {shortened(str(error), 200)}") from None
        kinds = type(tokenizer.model).__name__, type(tokenizer.decoder).__name__
        if kinds != ("BPE", "ByteLevel"):
            raise CheckpointError(f"{path} holds a {'/'.join(kinds)} tokenizer; Qwen3's is BPE/ByteLevel")
        if tokenizer.model.dropout:
            raise CheckpointError(f"{path} has a dropout, which makes tokens random; Qwen3's tokenizer has none")
        if foreign := _normalizers(tokenizer) - {"NFC"}:
            raise CheckpointError(f"{path} has the normalizer {', '.join(sorted(foreign))}; Qwen3's is NFC")
        return cls(tokenizer)

    def __len__(self) -> int:
        """The number of tokens, added ones included; a model may have more embedding rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included, by its spelling in tokenizer.json."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def exact_encoder(self) -> Callable[[str], list[int]]:
        """A function that encodes exactly the bytes of a text: without normalization, and without added tokens.

        Names of added tokens become the tokens that spell them. The function does not keep this object alive.
        """
        exact = _Tokenizer(self._tokenizer.model)
        if self._tokenizer.pre_tokenizer is not None:
            exact.pre_tokenizer = self._tokenizer.pre_tokenizer

        def encode(text: str) -> list[int]:
            ids: list[int] = exact.encode(text, add_special_tokens=False).ids
            return ids

        return encode

    def kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` returned when it was first called for this key: something costly that belongs to a tokenizer."""
        if key not in self._kept:
            self._kept[key] = make()
        found: Kept = self._kept[key]
        return found

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of `text`. Special tokens that are spelled out in it are recognized; none are added.

        limit: the most ids that are of use. A text of megabytes, which would take seconds and gigabytes of memory, is
        refused with a ContextLengthError if its beginning has more.

        Raises OptionError for anything but a string, for lone surrogates, and for text that the tokenizers library
        cannot process, such as a run of ten million spaces.
        """
        if not isinstance(text, str):
            raise OptionError(f"the text is {quoted(text)}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise OptionError("the text is not valid Unicode: it holds bytes that were not UTF-8") from None
        if _longest_blank(text) > _BLANK:
            raise OptionError(
                f"the text cannot be tokenized: it has more than {_BLANK:,} whitespace characters in a row"
            )
        if limit is not None and len(text) > _LONG:
            least = len(self._encoded(text[:_LONG])) - _MERGED
            if least > limit:
                raise ContextLengthError(
                    f"the text is too long: it takes more than {least:,} tokens, and at most {limit:,} fit; shorten it"
                )
        return self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        """The ids of a valid text. Raises OptionError for what the tokenizers library cannot process."""
        try:
            if len(text) < _LONG // 10:
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            else:  # unlike `encode`, `encode_batch` releases the interpreter's lock
                ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise OptionError(f"the text cannot be tokenized: {shortened(str(error), 200)}") from None
        return ids

    def plain_ids(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are text: no such token is in the result."""
        if self._special_names is None:
            names = {self.token_bytes(id).decode("utf-8", "replace") for id in self.special_ids} - {""}
            # The longest first, as the tokenizer matches them.
            found = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            self._special_names = re.compile(found or "(?!)")
        ids: list[int] = []
        start = 0
        for match in self._special_names.finditer(text):
            ids += self.encode(text[start : match.start() + 1])  # "<"; the next part begins with "|im_end|>"
            start = match.start() + 1
        return ids + self.encode(text[start:])

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that tokenizer.json puts before and after every text (its post-processor); `encode` adds none.

        Raises CheckpointError for a post-processor that does something else.
        """
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        framed = self._tokenizer.encode("a", add_special_tokens=True).ids
        start = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), None)
        if start is None:
            raise CheckpointError("tokenizer.json has a post-processor that changes texts; Qwen3's appends a token")
        return framed[:start], framed[start + len(plain) :]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`, with U+FFFD for incomplete UTF-8. special: keep special tokens, spelled out."""
        decoder = StreamDecoder(self, special=special)
        return "".join([decoder.push(id) for id in check_ids("ids", ids)]) + decoder.finish()

    def token_id(self, token: str) -> int | None:
        """The id of a token, as tokenizer.json spells it; None if there is none."""
        if not isinstance(token, str):
            raise OptionError(f"the token is {quoted(token)}, not a string")
        id: int | None = self._tokenizer.token_to_id(token)
        return id

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, perhaps part of a character; b"" for an id without a token."""
        try:
            if id in self._added:
                return str(self._added[id].content).encode()
            token = self._tokenizer.id_to_token(id)
        except OverflowError:  # negative, or more than 32 bits
            token = None
        except TypeError:
            raise OptionError(f"the token id is {quoted(id)}; it must be a whole number") from None
        if token is None:
            return b""
        try:
            return bytes([_BYTES[letter] for letter in token])
        except KeyError:  # an entry that is not spelled in byte-level characters is literal text
            return str(token).encode()

    def missing_ids(self, vocab_size: int) -> NDArray[np.intp]:
        """The ids below `vocab_size`, the model's number of embeddings, that have no token and must not be drawn."""
        if vocab_size not in self._missing:
            named = self._tokenizer.id_to_token
            missing = [id for id in range(vocab_size) if named(id) is None]
            self._missing[vocab_size] = np.array(missing, np.intp)
        return self._missing[vocab_size]


class StreamDecoder:
    """Decodes ids one at a time, in O(1) per token, and never emits part of a character."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special else tokenizer.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take the next id; returns the text that it completes, perhaps ""."""
        return "" if id in self._hidden else self._utf8.decode(self._tokenizer.token_bytes(id))

    @property
    def within_character(self) -> bool:
        """Whether the last id ended inside a character's bytes."""
        return bool(self._utf8.getstate()[0])

    def finish(self) -> str:
        """The rest of the text: U+FFFD for a character that was not completed."""
        return self._utf8.decode(b"", final=True)


def _longest_blank(text: str) -> int:
    """The length of a run of more than _BLANK whitespace characters, if there is one; else a smaller number."""
    longest, step = 0, _BLANK // 2
    for at in range(step, len(text), step):
        if text[at].isspace():
            end = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
            longest = max(longest, end - len(text[:at].rstrip()))
    return longest


def _is_library_error(error: BaseException) -> bool:
    """Whether it is an Exception, or a Rust panic of the tokenizers library, which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _normalizers(tokenizer: _Tokenizer) -> set[str]:
    """The types of the tokenizer's normalizers."""
    if tokenizer.normalizer is None:
        return set()
    state = json.loads(tokenizer.normalizer.__getstate__())
    parts = state["normalizers"] if state["type"] == "Sequence" else [state]
    return {str(part["type"]) for part in parts}
