"""Draft tokens, a draft model, prefixes in memory and on disk, batches, all at once: a text is the one without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_texts import PROMPTS, RandomTexts, outcome

import npqwen
from npqwen.generation.batch import Batch
from npqwen.generation.stream import Stream
from npqwen.model import Model

TEXTS = 200
BEGINNING = "<|im_start|>system\nYou define words, and add two numbers. 12 + 13 = 25. 14 + 30 = 44.<|im_end|>\n" * 12


def prompts(model: Model, draw: RandomTexts) -> list[int]:
    """A prompt; most begin as others do, at more than one page's length."""
    beginning = model.tokenizer.encode(BEGINNING)
    cut = draw.random.choice([0, 30, 256, 300, len(beginning)])
    return beginning[:cut] + model.tokenizer.encode(draw.random.choice(PROMPTS))


@pytest.mark.parametrize("bits", [4, 16])
def test_two_hundred_texts_are_the_same_with_everything_and_with_nothing(bits: int, tiny: Any, tmp_path: Path) -> None:
    structured = pytest.importorskip("llguidance", reason="structures need it") is not None
    accepted = cached = 0
    with npqwen.load(tiny(bits), threads=1, prefix_memory=0) as plain:
        draw = RandomTexts(bits, plain.tokenizer, structured)
        done = 0
        while done < TEXTS // 2:
            memory = draw.random.choice([None, 3 << 20])
            # A new model finds on disk what the one before has computed.
            with npqwen.load(
                tiny(bits), threads=2, draft=tiny(3), prefix_cache=tmp_path, prefix_memory=memory
            ) as model:
                for _ in range(4):
                    many = [(prompts(model, draw), draw.one()) for _ in range(draw.random.randrange(1, 7))]
                    batch = Batch(model) if len(many) > 1 else None
                    streams = [
                        Stream(
                            model,
                            ids,
                            batch=batch,
                            speculation=draw.random.choice([True, None]),
                            **options,
                            **draw.functions(done + at),
                        )
                        for at, (ids, options) in enumerate(many)
                    ]
                    draw.random.shuffle(order := list(range(len(many))))
                    found = {at: outcome(streams[at])[:5] for at in order}
                    for at, (ids, options) in enumerate(many):
                        alone = Stream(plain, ids, speculation=False, **options, **draw.functions(done + at))
                        assert found[at] == outcome(alone)[:5], (done + at, options)
                        accepted += streams[at].usage.accepted_tokens
                        cached += streams[at].usage.cached_tokens
                    done += len(many)
    assert accepted > 200
    assert cached > 2000
