"""Text to token ids and back: a checkpoint's `tokenizer.json`, and text that grows a token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from npqwen.errors import CheckpointError, OptionError, shortened
from npqwen.format.files import read_small


def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE (GPT-2) writes for each byte, and the byte it stands for.

    Bytes that Latin-1 prints stand for themselves; the others take U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


class Tokenizer:
    """The byte-level BPE tokenizer of a Qwen3 checkpoint.

    eos and template marks are *special*: `decode` leaves them out of the text. `<think>`, `<tool_call>` and
    their like are added tokens too, but not special: they are text.
    """

    def __init__(self, tokenizer: _Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._missing: dict[int, NDArray[np.intp]] = {}
        self.added_ids = frozenset(self._added)
        self.special_ids = frozenset(id for id, token in self._added.items() if token.special)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read `directory/tokenizer.json`; CheckpointError if it is missing, damaged or no byte-level BPE."""
        path = directory / "tokenizer.json"
        try:
            tokenizer = _Tokenizer.from_buffer(read_small(path))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; is {directory} a complete model directory?") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {shortened(str(error), 200)}") from None
        kinds = type(tokenizer.model).__name__, type(tokenizer.decoder).__name__
        if kinds != ("BPE", "ByteLevel"):
            raise CheckpointError(f"{path} holds a {'/'.join(kinds)} tokenizer; Qwen3's is BPE/ByteLevel")
        return cls(tokenizer)

    def __len__(self) -> int:
        """How many tokens there are, added ones included (the model may have more embedding rows)."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written in it are recognised; none are added.

        Raises OptionError if the text holds lone surrogates, which no UTF-8 text does.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise OptionError("the text is no valid Unicode: it holds bytes that were not UTF-8") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD. special=True writes special tokens out."""
        decoder = StreamDecoder(self, special=special)
        return "".join([decoder.push(int(id)) for id in ids]) + decoder.finish()

    def token_id(self, token: str) -> int | None:
        """The id of a token under its name in tokenizer.json, or None."""
        id: int | None = self._tokenizer.token_to_id(token)
        return id

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that one token stands for; b"" for an id without a token."""
        if id in self._added:
            return str(self._added[id].content).encode()
        try:
            token = self._tokenizer.id_to_token(id)
        except OverflowError:  # the library counts in 32 bits without a sign
            token = None
        if token is None:
            return b""
        try:
            return bytes([_BYTES[letter] for letter in token])
        except KeyError:  # a vocabulary entry that is no byte-level spelling stands for itself
            return str(token).encode()

    def missing_ids(self, vocab_size: int) -> NDArray[np.intp]:
        """The ids below `vocab_size` (the logits' width) that have no token and so must never be sampled."""
        if vocab_size not in self._missing:
            named = self._tokenizer.id_to_token
            missing = [id for id in range(vocab_size) if named(id) is None]
            self._missing[vocab_size] = np.array(missing, np.intp)
        return self._missing[vocab_size]


class StreamDecoder:
    """Turns ids into text one at a time, in O(1) a token, and never emits half a character."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special else tokenizer.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, perhaps none."""
        return "" if id in self._hidden else self._utf8.decode(self._tokenizer.token_bytes(id))

    @property
    def within_character(self) -> bool:
        """Whether bytes of a character wait for its others."""
        return bool(self._utf8.getstate()[0])

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)
