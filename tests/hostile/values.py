"""Strange values for any field of a JSON file."""

from __future__ import annotations

from random import Random
from typing import Any

NUMBERS: list[Any] = [
    -1, 0, 1, 2, 3, 7, 16, 17, 64, 255, 1000, 4096, 1 << 20, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64,
    10**30, 10**400, -(2**63), 0.5, 4.0, 1.0000001, -0.0, 5e-324, 1e-45, 1e-38, 1e-30, 1e20, 1e29, 1e30, 1e39, 1e100,
    1e299, 1.7e308, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "x", "4", "1e9", "qwen3", "qwen3_moe", "npqwen", "\0", "\x1b[31mred\x1b]0;title\7", "\u202egnp", "\ud800",
    "a\nb", "../../etc/passwd", "/dev/zero", "<|im_end|>", "{{ 1/0 }}", "%s%n", "é" * 50, "x" * 100_000,
]  # fmt: skip


def strange(random: Random) -> Any:
    """A value of any type."""
    kind = random.random()
    if kind < 0.5:
        return random.choice(NUMBERS)
    if kind < 0.7:
        return random.choice(TEXTS)
    if kind < 0.85:
        return random.choice([None, True, False])
    return random.choice(
        [
            *([], {}, [[]], [None], {"": None}, [1, "x", None, {}], list(range(5000)), {"type": "yarn"}, nested(100)),
            *({"rope_type": strange_scalar(random)}, [strange_scalar(random)], {strange_key(random): 1}),
        ]
    )


def strange_scalar(random: Random) -> Any:
    """A number or text."""
    return random.choice(NUMBERS if random.random() < 0.6 else TEXTS)


def strange_key(random: Random) -> str:
    """A key of an object."""
    return str(random.choice(TEXTS))


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def shown(value: Any) -> str:
    """A value for a label."""
    try:
        text = repr(value)
    except ValueError:  # an int of too many digits
        text = "an int of many digits"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text):,} characters)"
