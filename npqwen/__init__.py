"""Qwen3 language models on ordinary CPUs, from plain Python.

    import npqwen
    model = npqwen.load("Qwen/Qwen3-0.6B", bits=4)
    for piece in model.stream("Once upon a time", max_tokens=100):
        print(piece, end="", flush=True)

Importing it is cheap: Numba, the tokenizer and the client of the Hugging Face hub are imported when first needed.
"""

from __future__ import annotations

from npqwen.errors import (
    CheckpointError,
    ClosedError,
    ContextLengthError,
    FormatError,
    KernelCacheWarning,
    ModelNotFoundError,
    NpqwenError,
    OptionError,
    OutOfMemoryError,
    OutputError,
    PrefixCacheWarning,
    SamplingWarning,
    ThreadsWarning,
)

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all else here; Ctrl-C in it prints a traceback
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from typing import Any

    from npqwen.chat.chat_options import ChatOptions as ChatOptions
    from npqwen.chat.chat_stream import ChatStream as ChatStream
    from npqwen.chat.conversation import Conversation as Conversation
    from npqwen.chat.events import CallArguments as CallArguments
    from npqwen.chat.events import CallStart as CallStart
    from npqwen.chat.events import Event as Event
    from npqwen.chat.events import Finish as Finish
    from npqwen.chat.events import Notice as Notice
    from npqwen.chat.events import Reasoning as Reasoning
    from npqwen.chat.events import Reply as Reply
    from npqwen.chat.events import Text as Text
    from npqwen.chat.events import UnfinishedCall as UnfinishedCall
    from npqwen.engine.cache_type import CacheType
    from npqwen.engine.kv_cache import KVCache as KVCache
    from npqwen.generation.completion import Completion as Completion
    from npqwen.generation.completion import FinishReason as FinishReason
    from npqwen.generation.completion import Logprob as Logprob
    from npqwen.generation.completion import TokenLogprobs as TokenLogprobs
    from npqwen.generation.completion import Usage as Usage
    from npqwen.generation.loop_guard import LoopGuard as LoopGuard
    from npqwen.generation.options import GenerationOptions as GenerationOptions
    from npqwen.generation.sampler import Sampler as Sampler
    from npqwen.generation.sampling import Sampling as Sampling
    from npqwen.generation.score import ContinuationScore as ContinuationScore
    from npqwen.generation.session import Session as Session
    from npqwen.generation.stream import Stream as Stream
    from npqwen.model import Model as Model
    from npqwen.reports.evaluation import evaluate as evaluate
    from npqwen.reports.evaluation_report import Evaluation as Evaluation
    from npqwen.reports.verification import Verification as Verification
    from npqwen.reports.verification import verify as verify
    from npqwen.retrieval.ranking import Ranking as Ranking
    from npqwen.tokenizer import Tokenizer as Tokenizer
    from npqwen.tools.calls import ToolCall as ToolCall
    from npqwen.tools.toolbox import Tool as Tool
    from npqwen.tools.toolbox import ToolResult as ToolResult

    __version__: str

__all__ = [
    "CallArguments",
    "CallStart",
    "ChatOptions",
    "ChatStream",
    "CheckpointError",
    "ClosedError",
    "Completion",
    "ContextLengthError",
    "ContinuationScore",
    "Conversation",
    "Evaluation",
    "Event",
    "Finish",
    "FinishReason",
    "FormatError",
    "GenerationOptions",
    "KVCache",
    "KernelCacheWarning",
    "Logprob",
    "LoopGuard",
    "Model",
    "ModelNotFoundError",
    "Notice",
    "NpqwenError",
    "OptionError",
    "OutOfMemoryError",
    "OutputError",
    "PrefixCacheWarning",
    "Ranking",
    "Reasoning",
    "Reply",
    "Sampler",
    "Sampling",
    "SamplingWarning",
    "Session",
    "Stream",
    "Text",
    "ThreadsWarning",
    "TokenLogprobs",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolResult",
    "UnfinishedCall",
    "Usage",
    "Verification",
    "__version__",
    "evaluate",
    "load",
    "verify",
]

_LAZY = {
    "CallArguments": "npqwen.chat.events",
    "CallStart": "npqwen.chat.events",
    "ChatOptions": "npqwen.chat.chat_options",
    "ChatStream": "npqwen.chat.chat_stream",
    "Completion": "npqwen.generation.completion",
    "ContinuationScore": "npqwen.generation.score",
    "Conversation": "npqwen.chat.conversation",
    "Evaluation": "npqwen.reports.evaluation_report",
    "Event": "npqwen.chat.events",
    "Finish": "npqwen.chat.events",
    "FinishReason": "npqwen.generation.completion",
    "Logprob": "npqwen.generation.completion",
    "GenerationOptions": "npqwen.generation.options",
    "KVCache": "npqwen.engine.kv_cache",
    "LoopGuard": "npqwen.generation.loop_guard",
    "Model": "npqwen.model",
    "Notice": "npqwen.chat.events",
    "Ranking": "npqwen.retrieval.ranking",
    "Reasoning": "npqwen.chat.events",
    "Reply": "npqwen.chat.events",
    "Sampler": "npqwen.generation.sampler",
    "Sampling": "npqwen.generation.sampling",
    "Session": "npqwen.generation.session",
    "Stream": "npqwen.generation.stream",
    "Text": "npqwen.chat.events",
    "TokenLogprobs": "npqwen.generation.completion",
    "Tokenizer": "npqwen.tokenizer",
    "Tool": "npqwen.tools.toolbox",
    "ToolCall": "npqwen.tools.calls",
    "ToolResult": "npqwen.tools.toolbox",
    "UnfinishedCall": "npqwen.chat.events",
    "Usage": "npqwen.generation.completion",
    "Verification": "npqwen.reports.verification",
    "evaluate": "npqwen.reports.evaluation",
    "verify": "npqwen.reports.verification",
}


def load(
    model: str | os.PathLike[str],
    bits: int | None = None,
    *,
    threads: int | None = None,
    context: int | None = None,
    revision: str | None = None,
    low_disk: bool = False,
    yarn: float | None = None,
    kv: CacheType | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    prefix_cache: str | os.PathLike[str] | None = None,
    prefix_cache_size: int | None = None,
    prefix_memory: int | None = None,
    draft: str | os.PathLike[str] | Model | None = None,
    notice: Callable[[str], None] | None = None,
    progress: bool | Callable[[int, int], Any] | None = None,
    on_compile: Callable[[int, int], None] | None = None,
) -> Model:
    """Map a model into memory, after downloading and converting it if necessary.

    model: a Hugging Face id ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main" with a branch, tag or commit, or
    "unsloth/Qwen3-0.6B-GGUF:Q4_K_M" of GGUF files), a checkpoint directory, a GGUF file, or a converted directory.
    bits: 3, 4, 8 or 16 (bf16) bits per weight; default: those of a converted directory, otherwise 4.
    threads: default: one per core. More than the CPUs that this process may use are slower, and give a ThreadsWarning.
    context: maximum tokens of a prompt and its continuation; default: the model's own limit.
    revision: a branch, tag or commit of the Hugging Face id, unless its name has one after "@".
    low_disk: download and convert one weight file at a time, and keep none of them; resumes after an interruption.
    yarn: extends the context by YaRN, by a factor from 1 to 4: tokens needed / tokens trained on, such as 2 for 65,536
    tokens with a Qwen3 that was trained on 32,768. It is for models trained on fewer than 131,072 tokens, and makes
    answers to short texts a little worse. Default: as in config.json, where Qwen's models have none; 1: off.
    kv: the type of the cached keys and values, which every new token reads: "int8", "f16" or "f32". Default: int8, half
    of f16's memory and faster after long texts; f32 with bits=16, where nothing else is rounded either.
    adapters: LoRA adapters by name, {"sql": "directory that PEFT saved"}; each text uses one, named by the option
    `adapter`, or none. "directory:0.5" halves an adapter's effect.
    prefix_cache: a directory that keeps the keys and values of texts, and the tokens themselves, so that texts with a
    common prefix do not compute it again in a later run. Any number of processes and models may share it.
    prefix_cache_size: the most bytes that its files take, default 10 GB; the least recently used are removed.
    prefix_memory: the most bytes of prefixes kept in memory, with or without a directory; default: a quarter of what is
    available beside the weights, at most 4 GiB; 0: none. A draft model named by `draft` may keep as much again.
    draft: a draft model for speculative decoding: a smaller one with the same tokens, such as "Qwen/Qwen3-0.6B" for
    "Qwen/Qwen3-8B", or a loaded one. One pass of this model verifies several of its draft tokens, where that is faster
    (see the option `speculation`). Texts stay the same.

    progress: bars on stderr for download, conversion and compilation; default: if stderr is a terminal or a notebook's.
    False shows none, True always shows them. A function (bytes_done, bytes_total) is called during conversion instead.
    notice: a function (line) that is called with what was found, downloaded or converted, and where, and later with
    which files of the prefix cache were damaged, or why none can be written (default: a PrefixCacheWarning).
    on_compile: a function (done, total) that is called while kernels are compiled on first use, in place of its bar.

    Raises ModelNotFoundError, CheckpointError, FormatError, OptionError, OutputError or OutOfMemoryError.
    """
    from functools import partial

    from npqwen import hub
    from npqwen.hub.names import model_name
    from npqwen.progress import bars_or

    if prefix_cache is not None:  # before a download
        from npqwen.checks import check_path
        from npqwen.engine.prefix_files import check_directory

        check_directory(check_path(prefix_cache))
    bars, own = bars_or(progress)
    with bars:
        resolve = partial(
            hub.resolve,
            low_disk=low_disk,
            notice=notice,
            progress=own or bars.of("converting"),
            download_bars=bars.shown,
        )
        path = resolve(model, bits, revision=revision)

        from npqwen.hardware.contention import too_many_threads
        from npqwen.model import Model, load

        if draft is not None and not isinstance(draft, Model):
            draft = resolve(draft, None)

        if isinstance(threads, int) and (problem := too_many_threads(threads)) is not None:
            import warnings

            warnings.warn(problem, ThreadsWarning, stacklevel=2)
        return load(
            path,
            threads=threads,
            context=context,
            yarn=yarn,
            kv=kv,
            adapters=adapters,
            prefix_cache=prefix_cache,
            prefix_cache_size=prefix_cache_size,
            prefix_memory=prefix_memory,
            notice=notice,
            on_compile=on_compile or bars.of("compiling kernels (once)", " kernels"),
            name=model_name(model, revision),
            draft=draft,
        )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("npqwen")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
