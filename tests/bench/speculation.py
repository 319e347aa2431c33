"""What draft tokens are worth: tokens per second with and without them, taking turns.

    python tests/bench/speculation.py MODEL [--draft MODEL | --own-layer] [--acceptance SHARE] [--threads N]
        [--rounds N] [--tokens N]

MODEL: a converted directory; random weights will do. What the model says does not matter: its text is scripted, by a
bias on the script's next token, so that every kind of text is decoded at the model's real cost. --draft: a text without
repetition whose tokens this smaller model drafts, of which the given share is right, and what the times of single
passes promise. --own-layer: the same with the model's own draft layer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from npqwen.engine.hidden_tail import KEPT
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.format.encodings import UNIT_ROWS
from npqwen.generation.drafting import Drafting
from npqwen.generation.layer_drafter import LayerStatistics
from npqwen.generation.model_drafter import DraftModel
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

CODE = "".join(
    f"def area_{i}(width: float, height: float) -> float:\n    if width < {i}:\n        raise ValueError(width)\n"
    f"    return width * height + {i * 7 % 13}\n\n\n"
    for i in range(6)
)
RECORDS = "".join(f'{{"name": "item {i}", "price": {i * 17 % 101}, "tags": ["a", "b{i % 3}"]}},\n' for i in range(16))
FACTS = (
    "The lighthouse was built in 1872 on the northern cape. Its lamp was lit by oil until 1931, when a cable from the "
    "mainland brought electricity. Two keepers lived there with their families; the last left in 1986. Since then the "
    "house has been a museum, which is open from May to September and shows the lens, the logbooks and the foghorn. "
)
SUMMARY = (
    "The lighthouse on the northern cape was built in 1872. Oil lit its lamp until 1931, when a cable from the "
    "mainland brought electricity. The last keepers left in 1986; since then the house has been a museum, open from "
    "May to September, which shows the lens, the logbooks and the foghorn."
)


def texts(model: Model) -> dict[str, tuple[list[int], list[int]]]:
    """Each kind of text: the prompt's ids, and the script's."""
    encode = model.tokenizer.encode
    rng = random.Random(0)
    fresh = [rng.randrange(200, min(model.config.vocab_size, 4000)) for _ in range(1200)]
    return {
        "code edit": (encode(CODE), encode(CODE.replace("width", "length", 9))),
        "JSON copy": (encode(RECORDS), encode(RECORDS)),
        "summary": (encode(FACTS), encode(SUMMARY)),
        "no repetition": (fresh[:600], fresh[600:]),
    }


def rate(
    model: Model,
    prompt: list[int],
    script: list[int],
    speculation: bool | None,
    draft: DraftModel | None = None,
    layer: LayerStatistics | None = None,
) -> tuple[float, int, int]:
    """Tokens per second after the first; drafted and accepted tokens."""
    start = len(prompt)

    def follow(ids: list[int], logits: Any) -> None:
        logits[script[len(ids) - start]] = np.float32(1e4)
        if layer is not None:
            layer.layer.at = len(ids) - start  # type: ignore[attr-defined]

    options: Any = {"logits_processor": follow, "max_tokens": len(script), "speculation": speculation}
    model._drafting = Drafting(model.passes, draft, layer)  # nothing is remembered of the script
    done = Stream(model, prompt, temperature=0, **options).completion()
    assert done.ids == script[: len(done.ids)]
    return done.usage.decode_rate, done.usage.drafted_tokens, done.usage.accepted_tokens


class Scripted:
    """A draft model whose likeliest token is the script's, or another, at its real cost."""

    def __init__(self, model: Model, start: int, likeliest: list[int]) -> None:
        self.model, self.start, self.likeliest = model, start, likeliest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, ids: Any, cache: KVCache, out: Any) -> Any:
        self.model.forward(ids, cache, out=out)
        at = cache.length - self.start
        if 0 <= at < len(self.likeliest):
            out[0, self.likeliest[at]] = 1e4
        return out


class ScriptedLayer:
    """A model's draft layer whose likeliest token is the script's, or another, at its real cost."""

    def __init__(self, model: Model, likeliest: list[int]) -> None:
        assert model.draft_layer is not None
        self.layer, self.likeliest = model.draft_layer, likeliest
        self.at = self.drafted = 0
        """The token of the script that was drawn last, and draft tokens after it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def run(self, ids: Any, states: Any, cache: KVCache, out: Any, **options: Any) -> Any:
        found = self.layer.run(ids, states, cache, out, **options)
        self.drafted = self.drafted + 1 if options.get("chained") else 1
        if self.at + self.drafted < len(self.likeliest):
            id, groups = self.likeliest[self.at + self.drafted], options["groups"]
            lowest = out.shape[1] - UNIT_ROWS * groups.size
            if id >= lowest:
                id += lowest + UNIT_ROWS * (int(np.searchsorted(groups, id // UNIT_ROWS)) - id // UNIT_ROWS)
            if id < out.shape[1]:
                out[0, id] = 1e4
        return found


def layer_seconds(model: Model, depth: int, rounds: int = 9) -> float:
    """Median seconds of a token drafted by the model's draft layer at `depth`, of a quarter of the vocabulary."""
    layer = model.draft_layer
    assert layer is not None
    cache, size = layer.new_cache(), model.config.hidden_size
    states, out = np.zeros((depth, size), np.float32), np.empty((1, model.config.vocab_size // 64 * 16), np.float32)
    layer.run(np.full(depth, 300), states, cache, out)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        layer.run([300], states[:1], cache, out)
        seconds.append(time.perf_counter() - start)
        cache.truncate(depth)
    return statistics.median(seconds)


def pass_seconds(model: Model, tokens: int, depth: int, rounds: int = 9) -> float:
    """Median seconds of a forward pass over `tokens` tokens at `depth`, computing every token's logits."""
    cache, out, ids = model.new_cache(), model.new_logits(tokens), np.full(tokens, 300, np.int64)
    model.prefill(np.full(depth, 300), cache)
    cache.keep_checkpoint()
    seconds = []
    for _ in range(rounds):
        cache.reserve(tokens)
        start = time.perf_counter()
        model.forward_pieces([Piece(ids, cache, tokens, tokens - 1)], out)
        seconds.append(time.perf_counter() - start)
        cache.truncate(depth)
    return statistics.median(seconds)


def promised(model: Model, draft: Model | None, acceptance: float, depth: int) -> tuple[float, int]:
    """The ratio of speeds that the best number of draft tokens promises, and that number."""
    alone = pass_seconds(model, 1, depth)
    draft_seconds = layer_seconds(model, min(depth, KEPT)) if draft is None else pass_seconds(draft, 1, depth)
    best = 0.0, 0
    for count in range(1, 7):
        tokens = sum(acceptance**i for i in range(count + 1))
        best = max(best, (tokens * alone / (pass_seconds(model, count + 1, depth) + count * draft_seconds), count))
    return best


def measure_draft(model: Model, draft: Model | None, acceptance: float, rounds: int, tokens: int) -> None:
    """Print speeds with and without a draft model, or the model's own layer, and what was to be expected."""
    prompt, script = texts(model)["no repetition"]
    prompt, script = prompt[:200], script[:tokens]
    right = [i < acceptance * len(script) for i in range(len(script))]
    random.Random(1).shuffle(right)
    likeliest = [id if is_right else id + 1 for id, is_right in zip(script, right, strict=True)]
    scripted: Any = ScriptedLayer(model, likeliest) if draft is None else Scripted(draft, len(prompt), likeliest)
    drafter = None if draft is None else DraftModel(scripted, model)
    layer = None
    if draft is None:
        drafting: Any = SimpleNamespace(draft_layer=scripted, config=model.config, tokenizer=model.tokenizer)
        layer = LayerStatistics(drafting)
    ratios, promises, rates = [], [], (0.0, 0.0)
    drafted = accepted = 0
    for _ in range(rounds):
        promises.append(promised(model, draft, acceptance, len(prompt) + len(script) // 2))
        without, _, _ = rate(model, prompt, script, False)
        with_draft, drafted, accepted = rate(model, prompt, script, None, drafter, layer)
        ratios.append(with_draft / without)
        rates = without, with_draft
    expected, count = sorted(promises)[len(promises) // 2]
    found = statistics.median(ratios)
    print(f"plain {rates[0]:.1f}, drafting {rates[1]:.1f} tokens/s: {found:.2f}x")
    print(f"{drafted} drafted, {accepted} accepted")
    if draft is None:
        draft_seconds, alone = layer_seconds(model, KEPT), pass_seconds(model, 1, KEPT)
        print(f"a draft token takes {1000 * draft_seconds:.2f} ms, a pass of one token {1000 * alone:.2f} ms")
    print(f"{count} draft tokens a pass promise {expected:.2f}x; measured {found / expected:.2f} of that")


def main() -> None:
    """Print a table: one line for each kind of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--own-layer", action="store_true")
    parser.add_argument("--acceptance", type=float, default=0.65)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    if given.draft is not None:
        with load(given.draft, threads=given.threads) as draft, load(given.model, threads=given.threads) as model:
            measure_draft(model, draft, given.acceptance, given.rounds, given.tokens)
        return
    with load(given.model, threads=given.threads) as model:
        if given.own_layer:
            measure_draft(model, None, given.acceptance, given.rounds, given.tokens)
            return
        print(f"{'text':<16}{'plain':>9}{'drafting':>10}{'ratio':>8}   drafted, accepted")
        for name, (prompt, whole) in texts(model).items():
            script = whole[: given.tokens]
            rates: dict[bool | None, list[float]] = {False: [], None: []}
            for _ in range(given.rounds):
                for speculation, found in rates.items():
                    speed, drafted, accepted = rate(model, prompt, script, speculation)
                    found.append(speed)
            plain, drafting = (statistics.median(found) for found in rates.values())
            ratio = statistics.median(b / a for a, b in zip(rates[False], rates[None], strict=True))
            print(f"{name:<16}{plain:>9.1f}{drafting:>10.1f}{ratio:>7.2f}x   {drafted}, {accepted}")
        seconds = [1000 * time for time in model.passes.seconds]
        print("milliseconds of passes of 1 to 16 tokens: " + " ".join(f"{time:.2f}" for time in seconds[1:]))


if __name__ == "__main__":
    main()
