"""A text that grows, and is sometimes rewritten, with the keys and values computed for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_path
from npqwen.engine import snapshot
from npqwen.engine.prefix_page import common_prefix
from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.decoding import Prompt, check_prompt_ids
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.message_starts import message_starts
from npqwen.generation.option import with_options
from npqwen.generation.options import OPTIONS
from npqwen.generation.stream import Stream
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.batch import Batch
    from npqwen.generation.options import GenerationOptions


class Session:
    """A text and its KV cache: prompts that share a prefix, as the turns of a conversation do, compute only the rest.

        session = npqwen.Session(model)
        session.stream("Once upon a time", max_tokens=50).completion()
        session.append(" Suddenly")
        print(session.continue_(max_tokens=50).completion().text)
        print(session.text)

    `stream` and `prefill` replace the text by a prompt, `append` and `continue_` add to it. The option `adapter`
    applies to one call: a prompt with another adapter than the previous text is computed from the start. `append` and
    `continue_` use the text's. However a stream ends (finished, closed early, by Ctrl-C during a pass, by an error),
    the session knows which tokens its cache holds and continues from there. It need not be closed. One thread at a
    time; `fork()` for more.

    Logits are bitwise equal to those of a fresh start.
    """

    def __init__(self, model: LanguageModel) -> None:
        if not hasattr(model, "new_cache"):
            raise OptionError(f"the model is {type(model).__name__}; give what npqwen.load() returns")
        self._start(model, model.new_cache(), [])

    def _start(self, model: LanguageModel, cache: KVCache, ids: Sequence[int]) -> None:
        self.model = model
        self._cache = cache
        self._ids = list(ids)
        self._stream: Stream | None = None

    def __repr__(self) -> str:
        count, computed = len(self.ids), self.cache.length
        rest = "" if computed == count else f", {computed} of them computed"
        return f"<Session: {count} of {self.model.context} tokens{rest}>"

    @property
    def cache(self) -> KVCache:
        """The keys and values of the first `cache.length` of `ids`."""
        return self._cache if self._stream is None else self._stream.cache

    @property
    def ids(self) -> list[int]:
        """All tokens: the prompt and everything after it, including eos and the last token, which is not computed yet.

        The first `cache.length` of them have their keys and values in the cache.
        """
        return list(self._ids) if self._stream is None else self._stream.prompt_ids + self._stream.ids

    @property
    def text(self) -> str:
        """The text of `ids`, without special tokens such as <|im_end|>."""
        return self.model.tokenizer.decode(self.ids)

    @with_options(OPTIONS)
    def stream(self, prompt: Prompt, *, batch: Batch | None = None, **options: Unpack[GenerationOptions]) -> Stream:
        """Replace the text by a prompt, and generate what follows. Their common prefix is not computed again.

        prompt: text or token ids. batch: see `Stream`. An unfinished stream of this session is closed. Raises what
        `Stream` raises; the session then keeps its text.
        """
        ids = check_prompt_ids(self.model, prompt)
        known = self._settle()
        cache = self._cache_for(options.get("adapter"))
        # The last token is always run: its logits are not stored.
        reused = cache.reusable(min(common_prefix(known, ids), len(ids) - 1)) if cache is self._cache else 0
        self._stream = Stream(self.model, ids, cache=cache, cached=reused, batch=batch, **options)
        return self._stream

    @with_options(OPTIONS)
    def continue_(self, **options: Unpack[GenerationOptions]) -> Stream:
        """Generate what follows the text so far, as if it were a prompt of which only the last token is to be computed.

        After an eos, which is part of the text, the model begins something new. A greedy text is the same as that of
        one longer stream; `seed` and the penalties of generated tokens start over. Raises OptionError for an empty
        session.
        """
        self._settle()
        if options.get("adapter") is None and self._cache.adapter is not None:
            options["adapter"] = self._cache.adapter.name
        if not self._ids:
            raise OptionError("the session is empty, so there is nothing to continue; stream or prefill a prompt first")
        return self.stream(self._ids, **options)

    def prefill(
        self, prompt: Prompt, progress: Callable[[int, int], None] | None = None, *, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Replace the text by a prompt, and compute it: a long document, say, to continue, `fork` or `save`.

        prompt: text or token ids. progress(done, total): called after every chunk with tokens. adapter: see the option.
        Returns the float32 logits (vocab_size,) of the token that follows. After an interrupt, completed chunks are
        kept.

        Raises what `stream` raises; the session then keeps its text.
        """
        ids = check_prompt_ids(self.model, prompt, room=0)
        self._settle()
        return self._read(ids, progress, self._cache_for(adapter))

    def append(self, more: Prompt, progress: Callable[[int, int], None] | None = None) -> NDArray[np.float32]:
        """Compute text or token ids after the text so far; see `prefill` for the rest.

        Text is encoded on its own: no token spans the boundary to the text before it.
        """
        new = check_prompt_ids(self.model, more, room=0)
        self._settle()
        if len(self._ids) + len(new) > self.model.context:
            raise ContextLengthError(
                f"{len(self._ids)} tokens and {len(new)} more exceed the context of {self.model.context}"
            )
        return self._read(self._ids + new, progress, self._cache)

    def fork(self) -> Session:
        """An independent session with the same past; keys and values are shared until one of them changes."""
        fork = Session.__new__(Session)
        fork._start(self.model, self.cache.fork(), self.ids)
        return fork

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens and their keys and values to a file, which is replaced atomically if it exists.

        The file works with the same model only, on any machine. Raises OutputError if it cannot be written.
        """
        snapshot.save(check_path(path), self.cache, self.ids, self.model.fingerprint)

    @classmethod
    def load(cls, model: LanguageModel, path: str | os.PathLike[str]) -> Session:
        """Read what `save` wrote.

        Raises FormatError for a file that is not a saved session, is truncated, or was saved from another model or with
        an adapter that this one lacks, and ContextLengthError if it holds more tokens than the model's context.
        """
        session = cls.__new__(cls)
        cache = model.new_cache()
        adapters = model.adapters.values()
        ids = snapshot.load(check_path(path), cache, model.fingerprint, model.config.vocab_size, adapters)
        session._start(model, cache, ids)
        return session

    def _cache_for(self, adapter: str | None) -> KVCache:
        """The session's cache, or a new one if its adapter is another. OptionError for an unknown adapter."""
        own = None if self._cache.adapter is None else self._cache.adapter.name
        return self._cache if adapter == own else self.model.new_cache(adapter=adapter)

    def _read(
        self, ids: list[int], progress: Callable[[int, int], None] | None, cache: KVCache
    ) -> NDArray[np.float32]:
        """Make `ids` the text, and compute what the cache lacks of it; the logits (vocab_size,) of the last token."""
        if progress is not None:
            OPTIONS["progress"].check(progress)
        known = self._settle() if cache is self._cache else []
        reused = cache.reusable(min(common_prefix(known, ids), len(ids) - 1))
        cache.truncate(reused)
        self._cache, self._ids = cache, ids
        cache.mark(message_starts(ids, self.model.tokenizer))
        tokens = np.array(ids, np.int32)
        reused = self.model.prefixes.extend(tokens[:-1], self.cache)
        logits = self.model.prefill(tokens[reused:], self.cache, progress)
        self.model.prefixes.keep(tokens, self.cache)
        return logits

    def _settle(self) -> list[int]:
        """End the last stream; the ids whose keys and values the cache holds."""
        if self._stream is not None:
            try:
                self._stream.close()
            except OptionError:
                raise OptionError("another thread is running the session's stream; give each its own fork") from None
            self._ids, self._cache, self._stream = self.ids, self.cache, None
        return self._ids[: self.cache.length]


def check_session(session: Session | None, model: LanguageModel) -> None:
    """Raise OptionError unless `session` is a session of this model, or None."""
    if session is not None and not isinstance(session, Session):
        raise OptionError(f"session is {quoted(session)}; it must be a Session of this model")
    if session is not None and session.model is not model:
        raise OptionError("the session belongs to another model; start one with this model")
