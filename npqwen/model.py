"""The model that users see: text and conversations on top of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from npqwen.chat.chat_options import CHAT_OPTIONS
from npqwen.chat.template_files import TemplateFiles
from npqwen.checks import check_path, check_progress
from npqwen.engine.engine import Engine
from npqwen.errors import NpqwenError, OptionError
from npqwen.format.task import Task, check_task
from npqwen.generation import generate as text
from npqwen.generation.completion import Completion
from npqwen.generation.drafting import Drafting
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.layer_drafter import LayerStatistics
from npqwen.generation.model_drafter import DraftModel
from npqwen.generation.option import with_options
from npqwen.generation.options import OPTIONS
from npqwen.generation.sampler import Sampler
from npqwen.generation.sampling import Sampling
from npqwen.generation.stream import Stream
from npqwen.retrieval.embedder import Embedder
from npqwen.retrieval.ranking import Ranking
from npqwen.retrieval.reader import Reader
from npqwen.retrieval.reranker import Reranker
from npqwen.retrieval.task_files import TaskFiles
from npqwen.tokenizer import Tokenizer
from npqwen.wording import quoted

if TYPE_CHECKING:
    import os

    from typing_extensions import Unpack

    from npqwen.chat.chat_options import ChatOptions
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.chat.chat_template import ChatTemplate
    from npqwen.chat.conversation import Conversation
    from npqwen.chat.events import Reply
    from npqwen.engine.engine_options import EngineOptions
    from npqwen.generation.decoding import Prompt, Prompts
    from npqwen.generation.options import GenerationOptions
    from npqwen.generation.score import ContinuationScore
    from npqwen.generation.session import Session
    from npqwen.tools.toolbox import Tool

    Messages = str | Sequence[Mapping[str, Any]]
    Tools = Sequence[Callable[..., Any] | Mapping[str, Any] | Tool]


class Model(Engine):
    """A converted Qwen3 model, made by `npqwen.load`.

    Text: `generate`, `stream`, `score`. Conversations: `chat`, `stream_chat`, `conversation`, `render`, `count_tokens`.
    Search: `embed` of an embedding model, `rerank` of a reranker. Arrays: `logits`, `hidden`, and `forward` or
    `prefill` with a KV cache of `new_cache`. Properties: `name`, `path`, `task`, `bits`, `context`, `threads`,
    `weight_bytes`, `config`, `tokenizer`, `generation_config`, `chat_template`.

    Any number of threads may call it: one forward pass runs at a time, on all of the model's own threads, and the
    other callers wait. `close()`, or a `with` statement, ends those threads and unmaps the files.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        draft: Path | Model | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Map the converted directory `path`; see `load`."""
        self._name = name or path.name
        self._draft: Model | None = None
        self._loaded_draft: Model | None = None
        with ThreadPoolExecutor(1) as reader:
            # Reading a Qwen3 tokenizer takes as long as everything else, so it runs in parallel.
            tokenizer = reader.submit(Tokenizer.from_directory, path)
            # Read now, since the directory may be removed while the model runs; an error matters only in chats.
            self._template_files = reader.submit(TemplateFiles.from_directory, path)
            task_files = reader.submit(TaskFiles.from_directory, path, self._name)
            super().__init__(path, **options)
            try:
                self._tokenizer = tokenizer.result()
                self._task_files = task_files.result()
                self._generation_config = GenerationConfig.from_directory(path)
                if draft is not None and not isinstance(draft, Model):
                    own: EngineOptions = {**options, "context": None, "yarn": None, "adapters": None}
                    draft = self._loaded_draft = Model(draft, **own)
                self._draft = draft
                self._drafting = Drafting(
                    self.passes,
                    None if draft is None else DraftModel(draft, self),
                    LayerStatistics(self) if self.draft_layer is not None else None,
                )
            except NpqwenError:
                self.close()
                raise

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"context {self.context}, threads {self.threads}"
        return f"<Model {self.name}: {self.bits} bits, {state}>"

    @property
    def name(self) -> str:
        """The hub id that the model was loaded by, or its directory's name."""
        return self._name

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._tokenizer

    @property
    def task(self) -> Task:
        """What the model was trained for: "text", "embedding" or "reranking"."""
        return self._task_files.task

    @property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's own sampling, and its eos ids."""
        return self._generation_config

    @property
    def draft(self) -> Model | None:
        """The draft model; None if there is none."""
        return self._draft

    @property
    def drafting(self) -> Drafting:
        """What its texts share for speculative decoding."""
        return self._drafting

    def close(self) -> None:
        """Wait for the running pass, end the threads and unmap the files. Later calls raise ClosedError.

        Prefixes that are not yet in the prefix cache's directory are written. A draft model that the caller had loaded
        stays open.
        """
        try:
            super().close()
        finally:
            if self._loaded_draft is not None:
                self._loaded_draft.close()

    def _compile(self) -> None:
        super()._compile()
        Sampler(Sampling(top_k=2))(np.zeros(3, np.float32))  # compiles its kernels now, so that on_compile counts them

    @with_options(OPTIONS)
    def stream(
        self, prompt: Prompt, *, session: Session | None = None, **options: Unpack[GenerationOptions]
    ) -> Stream:
        """Continue `prompt` (raw text without a chat template, or token ids) piece by piece; see `Stream`.

        session: a `Session` of this model, which keeps keys and values between calls. options: see
        `npqwen.GenerationOptions`. Raises OptionError and ContextLengthError before anything is computed.
        """
        return text.stream(self, prompt, session=session, **options)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        n: None = None,
        session: Session | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompt, *, n: int, session: Session | None = None, **options: Unpack[GenerationOptions]
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        n: None = None,
        session: Session | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: Prompts, *, n: int, session: Session | None = None, **options: Unpack[GenerationOptions]
    ) -> list[list[Completion]]: ...

    @with_options(OPTIONS)
    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        n: int | None = None,
        session: Session | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Continue a prompt (raw text without a chat template, or token ids) to its end; several prompts give a list.

        n: return a list of n completions of each prompt, drawn with seed, seed + 1, ... if a seed is given. session: a
        `Session` of this model, which keeps keys and values between calls. options: see `npqwen.GenerationOptions`.
        Raises OptionError and ContextLengthError before anything is computed.
        """
        return text.generate(self, prompt, n=n, session=session, **options)

    @overload
    def score(
        self, prompt: Prompt, continuations: str, *, session: Session | None = None, adapter: str | None = None
    ) -> ContinuationScore: ...

    @overload
    def score(
        self, prompt: Prompt, continuations: Prompts, *, session: Session | None = None, adapter: str | None = None
    ) -> list[ContinuationScore]: ...

    def score(
        self,
        prompt: Prompt,
        continuations: str | Prompts,
        *,
        session: Session | None = None,
        adapter: str | None = None,
    ) -> ContinuationScore | list[ContinuationScore]:
        """The log-probabilities of continuations of a prompt, which is computed once.

            best = max(model.score("The sky is", [" blue", " green"]), key=lambda score: score.logprob)

        prompt, continuations: raw text without a chat template, or token ids. session: a `Session` of this model, which
        afterwards holds the prompt; later prompts compute only what follows their common prefix. adapter: the name of
        one of `adapters`.

        A continuation is encoded on its own and appended to the prompt's tokens. So write " blue" after "is": a prompt
        that ends in a space, or in the middle of a word, ends in tokens that the model rarely saw there.
        lm-evaluation-harness encodes prompt and continuation together, and skips as many tokens as the prompt alone
        has. The rest are the same tokens wherever the continuation begins with a space and the prompt does not end in
        one.

        Raises OptionError, CheckpointError and ContextLengthError before anything is computed.
        """
        from npqwen.generation.score import score

        return score(self, prompt, continuations, session=session, adapter=adapter)

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        instruction: str | bool | None = None,
        dimensions: int | None = None,
        *,
        truncate: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> NDArray[np.float32]:
        """Embed texts with an embedding model: float32 vectors (texts, dimensions), each of unit length.

            queries = model.embed(["how do I cut stone?"], instruction=True)
            documents = model.embed(passages)
            similarity = queries @ documents.T

        texts: a list of texts or of token ids; a single text gives (dimensions,). instruction: for queries, a sentence
        in English that describes the task: "Given a question, retrieve answers". True: the model's own, for a web
        search. None: for documents. dimensions: of the vectors, at least 32; default: all. truncate: cut texts that are
        longer than the context at their end; False: raise ContextLengthError. progress(done, total): called after each
        text. Names of special tokens in texts are encoded as those tokens, as in sentence-transformers.

        Raises OptionError, ContextLengthError and CheckpointError before anything is computed, and OutOfMemoryError.
        """
        alone = isinstance(texts, str)
        if not alone and not isinstance(texts, list | tuple):
            raise OptionError(f"texts is {quoted(texts)}; give a list of texts, or of token ids")
        check_progress(progress)
        embedder = self.embedder
        size = embedder.dimensions(dimensions)
        ids = embedder.ids([texts] if isinstance(texts, str) else texts, instruction, truncate)
        vectors = embedder.vectors(Reader(self).read(ids, progress), size)
        return vectors[0] if alone else vectors

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        instruction: str | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> Ranking:
        """Rank documents by how well they answer a query, with a reranker: their scores, from 0 to 1, and their order.

        instruction: a sentence in English that describes the task; default: retrieving passages for a web search.
        progress(done, total): called after each document. The common prefix of all prompts is computed once. Documents
        that do not fit the context are cut at their end. Names of special tokens are encoded as plain text.

        Raises OptionError, ContextLengthError and CheckpointError before anything is computed, and OutOfMemoryError.
        """
        if not isinstance(documents, list | tuple):
            raise OptionError(f"documents is {quoted(documents)}; give a list of texts")
        check_progress(progress)
        reranker = self.reranker
        ids = reranker.ids(query, documents, instruction)
        return Ranking.of(reranker.scores(Reader(self).read(ids, progress)))

    @cached_property
    def embedder(self) -> Embedder:
        """How texts become vectors. Raises OptionError if this is not an embedding model."""
        check_task(self.name, self.task, "embedding")
        config = self.config
        return Embedder(self._task_files, self.tokenizer, self.context, config.vocab_size, config.hidden_size)

    @cached_property
    def reranker(self) -> Reranker:
        """How documents get scores. Raises OptionError if this is not a reranker."""
        check_task(self.name, self.task, "reranking")
        return Reranker(self._task_files, self.tokenizer, self.context, self.config.vocab_size, self.output_row)

    @property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat templates. A base model has none; then `render` and the chats raise OptionError."""
        return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        from npqwen.chat.chat_template import ChatTemplate

        files = self._template_files.result()
        return ChatTemplate(files.sources, files.special_tokens, self.path)

    def render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """The prompt that the chat template renders from a conversation; see `ChatTemplate.render`."""
        return self.chat_template.render(messages, tools, thinking, add_generation_prompt, **template_options)

    def count_tokens(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        thinking: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> int:
        """The number of prompt tokens of `chat` with these arguments, including all that the chat template adds.

        It is the reply's `usage.prompt_tokens`. A string is a single message of the user, as in `chat`; for raw text,
        count `model.tokenizer.encode(text)`. Raises what `chat` raises for wrong messages and options.
        """
        from npqwen.chat.chat_options import ChatSettings
        from npqwen.chat.messages import checked

        settings = ChatSettings.of({"tools": tools, "thinking": thinking, "template_options": template_options})
        return len(settings.prompter(self).ids(checked(messages)))

    @overload
    def chat(
        self, messages: Messages, *, n: None = None, session: Session | None = None, **options: Unpack[ChatOptions]
    ) -> Reply: ...

    @overload
    def chat(
        self, messages: Messages, *, n: int, session: Session | None = None, **options: Unpack[ChatOptions]
    ) -> list[Reply]: ...

    @with_options(CHAT_OPTIONS, OPTIONS)
    def chat(
        self,
        messages: Messages,
        *,
        n: int | None = None,
        session: Session | None = None,
        **options: Unpack[ChatOptions],
    ) -> Reply | list[Reply]:
        """Answer a conversation.

        messages: [{"role": "user", "content": "17 + 25?"}, ...]; a string is a single message of the user. Append the
        reply's `messages` to continue. n: return a list of n answers, drawn with seed, seed + 1, ... if a seed is
        given. session: a `Session` of this model, which keeps keys and values between calls. options: see
        `npqwen.ChatOptions`.

        Raises OptionError for wrong messages or options, ContextLengthError for a conversation that does not fit.
        """
        from npqwen.chat.chat_stream import chat

        return chat(self, messages, n=n, session=session, **options)

    @with_options(CHAT_OPTIONS, OPTIONS)
    def chat_batch(self, conversations: Sequence[Messages], **options: Unpack[ChatOptions]) -> list[Reply]:
        """Answer many conversations in one batch; returns the replies, in order.

        conversations: each is what `chat` takes. Each is answered as it would be alone, with the same seed if one is
        given. options: for all of them, see `npqwen.ChatOptions`. With `stop`, they are answered one after the other.

        Raises what `chat` raises, for any of them, before anything is computed.
        """
        from npqwen.chat.chat_stream import chat_batch

        return chat_batch(self, conversations, **options)

    @with_options(CHAT_OPTIONS, OPTIONS)
    def stream_chat(
        self,
        messages: Messages,
        *,
        session: Session | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatStream:
        """Answer a conversation, event by event; see `ChatStream` for the events and `chat` for the rest."""
        from npqwen.chat.chat_stream import stream_chat

        return stream_chat(self, messages, session=session, **options)

    @with_options(CHAT_OPTIONS, OPTIONS)
    def conversation(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Unpack[ChatOptions],
    ) -> Conversation:
        """A conversation that keeps its messages and their keys and values. See `Conversation`."""
        from npqwen.chat.conversation import Conversation

        return Conversation(self, system, messages=messages, **options)


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    draft: str | os.PathLike[str] | Model | None = None,
    **options: Unpack[EngineOptions],
) -> Model:
    """Map a converted directory, silently.

    name: of the model, default the directory's. draft: a converted directory, loaded with the same threads, kv, prefix
    cache and callbacks and closed with the model, or a loaded model. options: see `npqwen.load`.

    Raises CheckpointError or FormatError for a directory that holds no converted model, OptionError for impossible
    options, OutputError for a prefix cache that cannot be written, OutOfMemoryError if memory cannot hold the buffers
    and, if `context` is given, a cache of that many tokens.
    """
    return Model(
        Path(path),
        name=name,
        draft=draft if draft is None or isinstance(draft, Model) else check_path(draft),
        **options,
    )
