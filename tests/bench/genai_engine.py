#!/usr/bin/env python3
"""OpenVINO GenAI or ONNX Runtime GenAI in its own process, measured on request: a child process of versus_openvino.py.

    genai_engine.py {openvino,onnxruntime} MODEL --threads N --context TOKENS --properties JSON

Requests and answers are those of engine.py, whose fixed random token ids are the prompts. npqwen is not imported, so
that this may run in another Python environment; versus_openvino.py says which packages it needs.

Both libraries generate as in an application: the next token is the most probable one, and the end of a text does not
end it. A prompt's time is that to its first token, and the time of decoding is that of the tokens after. Depth 0 is a
prompt of one token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine import Seconds, Stopwatch, answer_requests, stream

KV_BLOCK = 32
"""Tokens in a block of OpenVINO's KV cache on CPUs."""


class OpenVino:
    """OpenVINO GenAI with paged attention, one request at a time.

    Its cache of prefixes is on, as in its pipeline for a single user, so that only the first decoding after a prompt
    computes it. Timed prompts begin with another token each, so that nothing of them is in that cache.
    """

    def __init__(self, path: Path, threads: int, context: int, properties: Mapping[str, Any]) -> None:
        """properties: of the CPU plugin, by name, in addition to its number of threads."""
        import openvino
        import openvino_genai

        self._tensor = openvino.Tensor
        self._genai = openvino_genai
        self._vocabulary = int(json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        self._ids = stream(self._vocabulary, context).astype(np.int64)
        self._requests = 0
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2**31  # a prompt runs in one pass, as in the pipeline for a single user
        # A prompt to decode after, which stays, and one to time.
        scheduler.num_kv_blocks = 2 * (context // KV_BLOCK + 2)
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(path), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, **properties}
        )

    def about(self) -> dict[str, str]:
        """Versions, for the report."""
        return {"openvino-genai": self._genai.__version__}

    def prefill(self, tokens: int) -> Seconds:
        """Time of a prompt of `tokens` tokens and of choosing a token after it."""
        ids = self._ids[:tokens].copy()
        ids[0] = (ids[0] + 1 + self._requests) % self._vocabulary
        watch = Stopwatch()
        handle = self._request(ids, 1)
        self._finish()
        took = watch.seconds()
        if not handle.can_read():
            raise SystemExit(f"OpenVINO gave no token after {tokens}")
        return took

    def decode(self, tokens: int, depth: int) -> Seconds:
        """Time of `tokens` tokens after a prompt of `depth` tokens and one generated token."""
        handle = self._request(self._ids[: max(depth, 1)], 1 + tokens)
        while not handle.can_read():
            self._pipeline.step()
        watch = Stopwatch()
        steps = self._finish()
        took = watch.seconds()
        if steps != tokens:
            raise SystemExit(f"OpenVINO decoded {tokens} tokens after {depth} in {steps} steps")
        return took

    def _finish(self) -> int:
        """Run steps until all requests are finished. Returns how many."""
        steps = 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            steps += 1
        return steps

    def _request(self, ids: np.ndarray, tokens: int) -> Any:
        """The handle of a new request for `tokens` tokens after the prompt `ids`; without the handle, it is dropped."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        self._requests += 1
        return self._pipeline.add_request(self._requests, self._tensor(ids[np.newaxis].copy()), config)


class OnnxRuntime:
    """ONNX Runtime GenAI: one generator, which is rewound to what the next measurement shares with the last one."""

    def __init__(self, path: Path, threads: int, context: int, properties: Mapping[str, Any]) -> None:
        """properties: session options by name, in addition to the number of threads."""
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        session = {"intra_op_num_threads": threads, **properties}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        described = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        self._ids = stream(int(described["model"]["vocab_size"]), context)
        self._shared = 0
        """How many of the first ids are in the cache; generated tokens follow."""
        self._model = onnxruntime_genai.Model(config)
        options = onnxruntime_genai.GeneratorParams(self._model)
        room = context + 2
        # Before the minimum, the end of a text is not chosen.
        options.set_search_options(do_sample=False, max_length=room, min_length=room)
        self._generator = onnxruntime_genai.Generator(self._model, options)

    def about(self) -> dict[str, str]:
        """Versions, for the report."""
        import onnxruntime

        return {"onnxruntime-genai": self._genai.__version__, "onnxruntime": onnxruntime.__version__}

    def prefill(self, tokens: int) -> Seconds:
        """Time of a prompt of `tokens` tokens and of choosing a token after it."""
        self._shared = 0
        self._generator.rewind_to(0)
        watch = Stopwatch()
        self._run_prompt(tokens)
        return watch.seconds()

    def decode(self, tokens: int, depth: int) -> Seconds:
        """Time of `tokens` tokens after a prompt of `depth` tokens and one generated token."""
        depth = max(depth, 1)
        # The last token of the prompt runs again: its logits give the generated token.
        self._shared = min(self._shared, depth - 1)
        self._generator.rewind_to(self._shared)
        self._run_prompt(depth)
        watch = Stopwatch()
        for _ in range(tokens):
            self._generator.generate_next_token()
        took = watch.seconds()
        if (found := self._generator.token_count()) != depth + 1 + tokens:
            raise SystemExit(f"ONNX Runtime has {found - depth} tokens after a prompt of {depth}, not {1 + tokens}")
        return took

    def _run_prompt(self, tokens: int) -> None:
        """Run what is missing of the first `tokens` ids, and choose a token."""
        self._generator.append_tokens(self._ids[self._shared : tokens])
        self._generator.generate_next_token()
        self._shared = tokens


ENGINES: dict[str, Callable[..., OpenVino | OnnxRuntime]] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path, help="a directory that the engine's converter wrote")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--properties", type=json.loads, default={}, help="settings of the engine, in JSON")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    engine = ENGINES[options.engine](options.model, options.threads, options.context, options.properties)
    about = {"about": engine.about(), "load_seconds": time.perf_counter() - start}
    answer_requests(about, {"prefill": engine.prefill, "decode": engine.decode})


if __name__ == "__main__":
    main()
