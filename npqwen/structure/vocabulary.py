"""A tokenizer's vocabulary as llguidance needs it, and the grammars that were compiled for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from threading import Lock
from typing import TYPE_CHECKING

from npqwen.structure.constraint import Constraint
from npqwen.structure.limits import parser_limits
from npqwen.structure.structure import Structure, reason
from npqwen.structure.structure_error import StructureError
from npqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 16
"""The most compiled grammars that are kept."""
_END = "<|endoftext|>"


class _Tokens:
    """What llguidance asks of a tokenizer. It does not refer to that tokenizer, which keeps the vocabulary.

    A call encodes text that a structure requires. It must come out as it is, even if it is not normalized or has the
    name of an added token, so the tokens are not those of the tokenizer's own encoding.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(size)]
        self.special_token_ids = sorted(tokenizer.added_ids)
        self._encode = tokenizer.exact_encoder()

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Vocabulary:
    """Compiles structures to constraints on texts. Any number of threads may call it.

    Making one takes as long as reading a tokenizer: it is kept with the tokenizer by `vocabulary_of`.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Set[int]) -> None:
        """size: the number of logits. eos_ids: the tokens that end a text."""
        from llguidance import LLTokenizer, TokenizerWrapper

        self._size = max(size, len(tokenizer))
        self._eos_ids = sorted(eos_ids)
        ends = self._eos_ids or [tokenizer.token_id(_END) or 0]  # llguidance needs one
        self._tokens = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, self._size, ends[0])), eos_token=ends)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def constraint(self, structure: Structure) -> Constraint:
        """A constraint on one text. OptionError if no text can have this structure, or it is too complex."""
        return Constraint(self.compiled(structure).deep_copy(), self._size, self._eos_ids, structure.option)

    def compiled(self, structure: Structure) -> LLMatcher:
        """llguidance's matcher at the beginning of a text. OptionError as for `constraint`."""
        with self._lock:
            matcher = self._compiled.get(structure.grammar)
            if matcher is not None:
                self._compiled.move_to_end(structure.grammar)
        if matcher is None:
            matcher = self._compile(structure)
            with self._lock:
                self._compiled[structure.grammar] = matcher
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return matcher

    def _compile(self, structure: Structure) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, structure.grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether there is a first token
        if matcher.is_error():
            raise StructureError(structure.option, f"cannot be used: {reason(matcher.get_error())}")
        return matcher


def vocabulary_of(tokenizer: Tokenizer, size: int, eos_ids: Set[int]) -> Vocabulary:
    """The vocabulary of a model, which is made once."""
    key = Vocabulary, size, frozenset(eos_ids)
    return tokenizer.kept(key, lambda: Vocabulary(tokenizer, size, eos_ids))
