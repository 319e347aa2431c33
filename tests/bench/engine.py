#!/usr/bin/env python3
"""One engine in its own process, measured on request: the child process of interleave.py.

    engine.py serve {npqwen,llama} MODEL --threads N --context TOKENS
    engine.py first {npqwen,llama} MODEL --threads N --prompt TEXT

`serve` reads JSON requests, one per line, and answers each with a JSON line; between requests it sleeps on its pipe, so
that another engine has the machine. `first` generates one token from the prompt and prints it.

Both engines run the same token ids, a fixed random sequence; depth d means its first d tokens. A cache that holds more
than that is truncated rather than refilled; a hybrid's, to a state that it has kept, and refilled from there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Seconds = tuple[float, float]


class Engine(Protocol):
    """The interface that measurements use."""

    def about(self) -> dict[str, str]:
        """Versions and settings, for the report."""

    def vocabulary(self) -> int:
        """Number of token ids."""

    def length(self) -> int:
        """Tokens in the cache."""

    def reusable(self, length: int) -> int:
        """How many of the first `length` tokens `truncate` can keep: all, but of a hybrid perhaps none."""

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens, as many as `reusable` says."""

    def keep(self) -> None:
        """Make it possible for a hybrid to be truncated to the tokens that are in the cache now."""

    def run(self, ids: Ids, *, every: bool) -> None:
        """Run tokens after the cached ones. every: compute the logits of every token, not only of the last."""


class Llama:
    """llama.cpp through its C interface, with or without flash attention.

    flash: "on" or "off", with keys and values in f16; "q8_0": on, with both in q8_0.
    """

    def __init__(self, path: Path, threads: int, context: int, flash: str, mapped: bool) -> None:
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        if mapped:
            options.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = 2048
        settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = {
            "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            "q8_0": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        }[flash]
        if flash == "q8_0":
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_Q8_0
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens, flash attention {flash}")
        self._length = 0
        self._kept: tuple[int, Any] | None = None
        """A length to which the cache of a hybrid can be truncated, and its state."""

    def about(self) -> dict[str, str]:
        return {
            "llama-cpp-python": self._c.__version__,
            "llama.cpp system": self._c.llama_print_system_info().decode(),
        }

    def vocabulary(self) -> int:
        return int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model)))

    def length(self) -> int:
        return self._length

    def reusable(self, length: int) -> int:
        if length >= self._length or not self._c.llama_model_is_hybrid(self._model):
            return min(length, self._length)
        return self._kept[0] if self._kept is not None and self._kept[0] <= length else 0

    def truncate(self, length: int) -> None:
        memory = self._c.llama_get_memory(self._context)
        if self._kept is not None and length == self._kept[0]:
            data = self._kept[1]
            if self._c.llama_state_seq_set_data(self._context, data, len(data), 0) != len(data):
                raise SystemExit("llama.cpp cannot restore its state")
        elif not length:
            self._c.llama_memory_clear(memory, True)
        elif not self._c.llama_memory_seq_rm(memory, 0, length, -1):
            raise SystemExit(f"llama.cpp cannot truncate its cache to {length} tokens")
        self._length = length

    def keep(self) -> None:
        if self._c.llama_model_is_hybrid(self._model) and (self._kept is None or self._kept[0] != self._length):
            data = (ctypes.c_uint8 * self._c.llama_state_seq_get_size(self._context, 0))()
            self._c.llama_state_seq_get_data(self._context, data, len(data), 0)
            self._kept = self._length, data

    def run(self, ids: Ids, *, every: bool) -> None:
        for start in range(0, len(ids), 2048):
            part = ids[start : start + 2048]
            batch = self._c.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part.tolist()):
                batch.token[i] = token
                batch.pos[i] = self._length + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or start + i == len(ids) - 1
            status = self._c.llama_decode(self._context, batch)
            self._c.llama_batch_free(batch)
            if status:
                raise SystemExit(f"llama_decode of {len(part)} tokens after {self._length} returned {status}")
            self._length += len(part)
        if not self._c.llama_get_logits_ith(self._context, -1):
            raise SystemExit("llama.cpp gave no logits")

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """A copy of the logits of the last run: (rows, vocabulary), as many as it computed."""
        found = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (rows, self.vocabulary()))
        return np.array(found, np.float32)


class Npqwen:
    """npqwen, called as its own generation calls the model."""

    def __init__(self, path: Path, threads: int, context: int, flash: str, mapped: bool) -> None:
        from npqwen.model import load

        self._model = load(path, threads=threads)
        self._cache = self._model.new_cache(context)
        self._logits = np.empty((1, self._model.config.vocab_size), np.float32)
        self._length = 0

    def about(self) -> dict[str, str]:
        import numba

        import npqwen

        return {"npqwen": npqwen.__version__, "numba": numba.__version__, "numpy": np.__version__}

    def vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def length(self) -> int:
        return self._length

    def reusable(self, length: int) -> int:
        return self._cache.reusable(length)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)
        self._length = length

    def keep(self) -> None:
        self._cache.keep_checkpoint()

    def run(self, ids: Ids, *, every: bool) -> None:
        if every:
            self._model.forward(ids, self._cache, all_logits=True)
        elif len(ids) == 1:
            self._model.forward(ids, self._cache, out=self._logits)
        else:
            self._model.prefill(ids, self._cache)
        self._length += len(ids)


def stream(vocabulary: int, count: int) -> Ids:
    """The `count` token ids that every engine runs."""
    return np.random.default_rng(0).integers(0, vocabulary, count, dtype=np.int32)


def seek(engine: Engine, ids: Ids, depth: int) -> None:
    """Make the cache hold exactly the first `depth` tokens."""
    if engine.length() > depth:
        engine.truncate(engine.reusable(depth))
    if engine.length() < depth:
        engine.run(ids[engine.length() : depth], every=False)
    if depth:
        engine.keep()


class Stopwatch:
    """Wall-clock and CPU seconds (of all threads of this process) since it was created.

    An engine that always computes has CPU seconds of about wall-clock seconds times threads. Fewer mean that other
    programs were running.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> Seconds:
        """(wall, CPU) so far."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def prefill(engine: Engine, ids: Ids, tokens: int) -> Seconds:
    """Time of a prompt of `tokens` tokens in an empty cache, with the logits of its last token."""
    seek(engine, ids, 0)
    watch = Stopwatch()
    engine.run(ids[:tokens], every=False)
    return watch.seconds()


def decode(engine: Engine, ids: Ids, tokens: int, depth: int) -> Seconds:
    """Time of decoding `tokens` tokens one by one, the first at position `depth`."""
    seek(engine, ids, depth)
    watch = Stopwatch()
    for position in range(depth, depth + tokens):
        engine.run(ids[position : position + 1], every=False)
    return watch.seconds()


def batch(engine: Engine, ids: Ids, tokens: int, depth: int, passes: int) -> Seconds:
    """Mean time of single passes over `tokens` tokens with all their logits, as in verifying a draft."""
    wall = cpu = 0.0
    for _ in range(passes):
        seek(engine, ids, depth)
        watch = Stopwatch()
        engine.run(ids[depth : depth + tokens], every=True)
        took = watch.seconds()
        wall, cpu = wall + took[0], cpu + took[1]
    return wall / passes, cpu / passes


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None if the platform does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


MEASURES: dict[str, Callable[..., Seconds]] = {"prefill": prefill, "decode": decode, "batch": batch}
ENGINES: dict[str, Callable[..., Engine]] = {"npqwen": Npqwen, "llama": Llama}


def serve(kind: str, path: Path, threads: int, context: int, flash: str, mapped: bool) -> None:
    """Load an engine and answer requests for its measures."""
    start = time.perf_counter()
    engine = ENGINES[kind](path, threads, context, flash, mapped)
    ids = stream(engine.vocabulary(), context)
    about = {"about": engine.about(), "load_seconds": time.perf_counter() - start}
    answer_requests(about, {name: partial(measure, engine, ids) for name, measure in MEASURES.items()})


def answer_requests(about: dict[str, Any], measures: Mapping[str, Callable[..., Seconds]]) -> None:
    """Print `about`, then answer requests {"measure": name, ...its arguments} with their seconds until the input ends.

    The measure "memory" is this process's peak.
    """
    answer = about
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        measure = request.pop("measure")
        if measure == "memory":
            answer = {"bytes": peak_memory()}
        else:
            wall, cpu = measures[measure](**request)
            answer = {"seconds": wall, "cpu_seconds": cpu}


def first(kind: str, path: Path, threads: int, prompt: str) -> None:
    """Load a model as an application would and print one greedy token after the prompt."""
    if kind == "npqwen":
        import npqwen

        with npqwen.load(str(path), threads=threads) as model:
            print(model.generate(prompt, max_tokens=1, temperature=0).text, flush=True)
    else:
        import llama_cpp

        llama: Any = llama_cpp.Llama(str(path), n_ctx=4096, n_threads=threads, verbose=False)
        print(llama(prompt, max_tokens=1, temperature=0)["choices"][0]["text"], flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("serve", "first"))
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--flash", choices=("on", "off", "q8_0"), default="on", help="llama.cpp's attention")
    parser.add_argument("--mapped", action="store_true", help="let llama.cpp map its weights instead of repacking them")
    parser.add_argument("--prompt", default="Once upon a time")
    options = parser.parse_args(arguments)
    if options.action == "serve":
        serve(options.engine, options.model, options.threads, options.context, options.flash, options.mapped)
    else:
        first(options.engine, options.model, options.threads, options.prompt)


if __name__ == "__main__":
    main()
