"""The model that users see: text and conversations on top of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from npqwen.engine.engine import Engine
from npqwen.errors import NpqwenError
from npqwen.generation import generate as text
from npqwen.generation.completion import Completion
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampler import greatest
from npqwen.generation.stream import Stream
from npqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.chat.chat_options import ChatOptions
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.chat.chat_template import ChatTemplate
    from npqwen.chat.conversation import Conversation
    from npqwen.chat.events import Reply
    from npqwen.generation.generate import Prompts
    from npqwen.generation.options import GenerationOptions
    from npqwen.generation.session import Session


class Model(Engine):
    """A converted Qwen3 model, made by `npqwen.load`.

    Text: `generate`, `stream`. Conversations: `chat`, `stream_chat`, `conversation`, `render`. Arrays: `logits`,
    `hidden`, and `forward` or `prefill` with a cache of `new_cache`.

    Any number of threads may call it: one forward pass runs at a time, on all of the model's own threads, and the
    other callers wait. `close()`, or a `with` statement, ends those threads and unmaps the files.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        yarn: float | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map the converted directory `path`; see `load`."""
        with ThreadPoolExecutor(1) as reader:
            # A Qwen3 tokenizer takes as long to read as everything else: they are read side by side.
            tokenizer = reader.submit(Tokenizer.from_directory, path)
            super().__init__(path, threads=threads, context=context, yarn=yarn, on_compile=on_compile)
            try:
                self.tokenizer = tokenizer.result()
                self.generation_config = GenerationConfig.from_directory(path)
            except NpqwenError:
                self.close()
                raise

    def _compile(self) -> None:
        super()._compile()
        greatest(np.zeros(2, np.float32), 1)  # the sampler's kernel: now, so that on_compile includes it

    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> Stream:
        """Continue `prompt`, raw text without a chat template, piece by piece; see `Stream` and `GenerationOptions`.

        Raises OptionError and ContextLengthError before anything is computed.
        """
        return text.stream(self, prompt, **options)

    @overload
    def generate(self, prompt: str, *, n: None = None, **options: Unpack[GenerationOptions]) -> Completion: ...

    @overload
    def generate(self, prompt: str, *, n: int, **options: Unpack[GenerationOptions]) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: Prompts, *, n: None = None, **options: Unpack[GenerationOptions]
    ) -> list[Completion]: ...

    @overload
    def generate(self, prompt: Prompts, *, n: int, **options: Unpack[GenerationOptions]) -> list[list[Completion]]: ...

    def generate(
        self, prompt: str | Prompts, *, n: int | None = None, **options: Unpack[GenerationOptions]
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Continue a prompt, raw text without a chat template, to its end; a list of prompts gives a list.

        n: a list of n completions of each prompt, drawn with seed, seed + 1, ... if a seed is given. options: see
        `GenerationOptions`. Raises OptionError and ContextLengthError before anything is computed.
        """
        return text.generate(self, prompt, n=n, **options)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat templates. A base model has none; then `render` and the chats raise OptionError."""
        from npqwen.chat.chat_template import ChatTemplate

        return ChatTemplate.from_directory(self.path)

    def render(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """The prompt that the chat template makes of a conversation; see `ChatTemplate.render`."""
        return self.chat_template.render(messages, tools, thinking, add_generation_prompt, **template_options)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        session: Session | None = None,
        **options: Unpack[ChatOptions],
    ) -> Reply:
        """Answer a conversation.

        messages: [{"role": "user", "content": "17 + 25?"}, ...]; a string is a single message of the user. Append the
        reply's `messages` to continue. session: a `Session` of this model, which keeps what was computed between calls.
        options: see `npqwen.chat.chat_options.ChatOptions`.

        Raises OptionError for wrong messages or options, ContextLengthError for a conversation that does not fit.
        """
        return self.stream_chat(messages, session=session, **options).run()

    def stream_chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        session: Session | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatStream:
        """Answer a conversation, event by event: Reasoning, Text, ToolCall, ToolResult, Notice, Finish. See `chat`."""
        from npqwen.chat.chat_stream import stream_chat

        return stream_chat(self, messages, session=session, **options)

    def conversation(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Unpack[ChatOptions],
    ) -> Conversation:
        """A conversation that keeps its messages and what was computed for them. See `Conversation`."""
        from npqwen.chat.conversation import Conversation

        return Conversation(self, system, messages=messages, **options)


def load(
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    yarn: float | None = None,
    on_compile: Callable[[int, int], None] | None = None,
) -> Model:
    """Map a converted directory.

    threads: default, this machine's performance cores. context: maximum tokens of a sequence, default the model's
    own. yarn: the factor by which YaRN extends the context, see `npqwen.load`. on_compile(done, total): called while
    kernels are compiled, on the first use on a machine.

    Raises CheckpointError or FormatError for a directory that holds no converted model, OptionError for impossible
    options, OutOfMemoryError if memory cannot hold the buffers and the cache of a context that is given.
    """
    return Model(Path(path), threads=threads, context=context, yarn=yarn, on_compile=on_compile)
