"""npqwen on Ray: actors for `ray.data`, and a Serve application with replicas. Needs `npqwen[ray]`.

    ds.map_batches(npqwen.ray.Generator, fn_constructor_kwargs={"model": "Qwen/Qwen3-4B"}, num_cpus=8, compute=...)
    serve.run(npqwen.ray.application("Qwen/Qwen3-4B", replicas=4, cpus=8))

Actors on one machine map the same weights: several take the memory of one, plus that of their KV caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import npqwen
from npqwen.errors import NpqwenError, OptionError
from npqwen.wording import quoted

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
except ModuleNotFoundError as error:
    raise OptionError(f'{error.name} is not installed; pip install "npqwen[ray]"') from None

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette
    from starlette.types import Receive, Scope, Send

Batch = dict[str, Any]

MAX_ONGOING_REQUESTS = 32
"""Requests that a replica takes at a time: twice as many as it computes at once, so that its passes are always full."""
_MAX_PREFIXES = 100_000
"""The most prompt prefixes for which a router remembers the replica."""
_STEP = 1024
"""Raw prompts are compared in steps of this many characters."""


class Generator:
    """Answers the prompts of a dataset: a class for `ray.data.Dataset.map_batches`.

    Adds the columns `text`, `reasoning`, `finish_reason`, `prompt_tokens`, `generated_tokens` and `error`. A prompt
    that cannot be answered, such as one that is longer than the context, has its error message there, and no text.
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "prompt",
        chat: bool = True,
        threads: int | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """
        model: what `npqwen.load` takes; it must be on the actor's machine, or on the hub. column: the prompts, texts
        or, with chat, also lists of messages. chat: whether the chat template is applied. threads: by default the
        actor's num_cpus. load_options: of `npqwen.load`. options: of `Model.chat`, or of `Model.generate`.
        """
        self._column, self._chat, self._options = column, chat, options
        self._model = npqwen.load(model, threads=threads or assigned_cpus(), **(load_options or {}))

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the answers' columns added; all prompts are computed together."""
        rows = [self._row(answer) for answer in self._answers(list(batch[self._column]))]
        names = ("text", "reasoning", "finish_reason", "prompt_tokens", "generated_tokens", "error")
        return batch | {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    def _answers(self, prompts: Sequence[Any]) -> list[Any]:
        """Replies or completions, or the errors of prompts that cannot be answered."""
        run = self._model.chat_batch if self._chat else self._model.generate
        try:
            return list(run([_plain(prompt) for prompt in prompts], **self._options))
        except NpqwenError as error:
            if len(prompts) == 1:
                return [error]
            half = len(prompts) // 2  # nothing was computed: errors are raised before that
            return self._answers(prompts[:half]) + self._answers(prompts[half:])

    def _row(self, answer: Any) -> tuple[str, str, str, int, int, str]:
        if isinstance(answer, NpqwenError):
            return "", "", "", 0, 0, str(answer)
        usage = answer.usage
        reasoning = answer.reasoning if self._chat else ""
        return answer.text, reasoning, answer.finish_reason, usage.prompt_tokens, usage.generated_tokens, ""


class Embedder:
    """Makes vectors of the texts of a dataset: a class for `ray.data.Dataset.map_batches`.

    Adds the column `embedding`: float32, of unit length.
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "text",
        threads: int | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """model, threads and load_options: see `Generator`. column: the texts. options: of `Model.embed`."""
        self._column, self._options = column, options
        self._model = npqwen.load(model, threads=threads or assigned_cpus(), **(load_options or {}))

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the column of vectors added."""
        return batch | {"embedding": self._model.embed(list(map(str, batch[self._column])), **self._options)}


def assigned_cpus() -> int | None:
    """The CPUs that Ray has given to this actor or task; None outside of Ray, or if it got none."""
    if not ray.is_initialized():
        return None
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return max(1, int(cpus)) if cpus else None


def _plain(prompt: Any) -> Any:
    """A text, or a list of messages without the keys that Arrow fills with None. Raises OptionError for others."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence | np.ndarray) or not all(isinstance(message, Mapping) for message in prompt):
        raise OptionError(f"the prompt is {quoted(prompt)}; give text or messages")
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def application(
    model: str | os.PathLike[str],
    *,
    replicas: int | tuple[int, int] = 1,
    cpus: int = 1,
    max_ongoing_requests: int = MAX_ONGOING_REQUESTS,
    load_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Application:
    """A Ray Serve application with all endpoints of `npqwen serve`, for `serve.run`.

    replicas: how many, each with `cpus` threads; two numbers: the least and the most, scaled by load. A request goes to
    the replica that has computed the longest prefix of its prompt, unless that one already has `max_ongoing_requests`;
    otherwise to the one with the fewest. load_options: of `npqwen.load`. settings: of `npqwen.server.app`.
    """
    scaling: dict[str, Any] = (
        {"num_replicas": replicas}
        if isinstance(replicas, int)
        else {"autoscaling_config": {"min_replicas": replicas[0], "max_replicas": replicas[1]}}
    )
    served = serve.deployment(
        _Replica,
        name="npqwen",
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=max_ongoing_requests,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **scaling,
    ).bind(os.fspath(model), dict(load_options or {}), settings)
    front = serve.deployment(
        serve.ingress()(_Front),
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
    )
    found: Application = front.bind(served)
    return found


class _Replica:
    """A model and the server's application, in an actor."""

    def __init__(self, model: str, load_options: dict[str, Any], settings: dict[str, Any]) -> None:
        from npqwen.server import app

        self._model = npqwen.load(model, threads=assigned_cpus(), **load_options)
        self._app = app(self._model, **({"hosts": ("*",)} | settings))

    async def answer(self, digests: list[str], scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The application's ASGI messages. digests: for the router."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            if request:
                return request.pop()
            await asyncio.Event().wait()  # a client that disconnects cancels the task
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(dict(message))

        async def run() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()


class _Front:
    """The ingress: reads requests, and forwards them to replicas and the answers to clients."""

    def __init__(self, served: Any) -> None:
        """served: the handle of the replicas."""
        self._served = served.options(stream=True)

    def __serve_build_asgi_app__(self) -> Starlette:
        """The ingress's ASGI application, for Ray."""
        from starlette.applications import Starlette

        made = Starlette()
        made.mount("/", self._forward)
        return made

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        body = await Request(scope, receive).body()
        kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
        plain = {name: scope[name] for name in kept if name in scope} | {"root_path": "", "client": ("127.0.0.1", 0)}
        plain["server"] = ("127.0.0.1", 80)
        messages = self._served.answer.remote(prefix_digests(body), plain, body)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            messages.cancel()

        watching = asyncio.create_task(watch())
        try:
            async for message in messages:
                await send(message)
        except asyncio.CancelledError:
            messages.cancel()
            raise
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching


def prefix_digests(body: bytes) -> list[str]:
    """Digests of the prefixes of a request's prompt, the longest last: after each message, or every 1,024 characters.

    Empty if the body has no prompt.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, dict):
        return []
    parts = [found.get("model"), found.get("tools"), found.get("system"), found.get("instructions")]
    prompt = next((found[name] for name in ("messages", "input", "prompt") if found.get(name)), None)
    if isinstance(prompt, str):
        steps: list[Any] = [prompt[at : at + _STEP] for at in range(0, len(prompt), _STEP)]
    elif isinstance(prompt, list):
        steps = prompt
    else:
        return []
    digest = hashlib.sha256(json.dumps(parts).encode())
    digests = []
    for step in steps:
        digest.update(json.dumps(step).encode())
        digests.append(digest.hexdigest()[:24])
    return digests


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Routes a request to the replica that has computed the longest prefix of its prompt."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray."""
        self._holders: OrderedDict[str, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by rank: the one with the longest prefix, then the others, fewest requests first."""
        queues = self.replica_queue_len_cache

        def length(replica: RunningReplica) -> int:
            return queues.get(replica.replica_id) or 0

        rest = sorted(candidate_replicas, key=length)
        for digest in reversed(_digests(pending_request)):
            for replica in rest:
                if replica.replica_id == self._holders.get(digest):
                    return [[replica], *([other] for other in rest if other is not replica)]
        return [[replica] for replica in rest]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray, with the replica that took a request."""
        for digest in _digests(pending_request):
            self._holders[digest] = replica_id
            self._holders.move_to_end(digest)
        while len(self._holders) > _MAX_PREFIXES:
            self._holders.popitem(last=False)


def _digests(request: PendingRequest | None) -> list[str]:
    return [] if request is None or not request.args or not isinstance(request.args[0], list) else request.args[0]
