"""The gated DeltaNet kernel of this process's instruction set against its formulas in NumPy, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
from gated_delta_calls import INDEX, Layer, Shape, State, Tokens, in_numpy, parts_of, run_pass

SHAPES = [
    Shape(1, 1, 16, 16), Shape(2, 2, 32, 32), Shape(3, 6, 16, 32), Shape(2, 6, 32, 16), Shape(1, 3, 32, 48),
    Shape(2, 2, 128, 128), Shape(1, 17, 16, 16),
]  # fmt: skip
SMALL = Shape(2, 4, 32, 48)


def same(mine: tuple[np.ndarray, State], theirs: tuple[np.ndarray, State]) -> None:
    """Outputs and next states equal to the bit."""
    assert np.array_equal(mine[0], theirs[0])
    assert np.array_equal(mine[1].values, theirs[1].values)


def in_pieces(layer: Layer, state: State, tokens: Tokens, size: int) -> tuple[np.ndarray, State]:
    """Outputs and next state of as many passes of `size` tokens as it takes."""
    outputs = []
    for first in range(0, len(tokens), size):
        ((out, state),) = run_pass(layer, [(state, tokens.part(first, min(size, len(tokens) - first)), 0)])
        outputs.append(out)
    return np.concatenate(outputs), state


def token_by_token(layer: Layer, state: State, tokens: Tokens) -> tuple[np.ndarray, list[State]]:
    """Outputs of passes of one token each, and the states before, between and after them."""
    outputs, states = [], [state]
    for index in range(len(tokens)):
        ((out, after),) = run_pass(layer, [(states[-1], tokens.part(index, 1), 0)])
        outputs.append(out)
        states.append(after)
    return np.concatenate(outputs), states


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 40])
def test_outputs_and_states_are_those_of_the_formulas(shape: Shape, count: int) -> None:
    layer, state, tokens = Layer(shape), State.random(shape, 1), Tokens(shape, count, 2)
    ((out, after),) = run_pass(layer, [(state, tokens, 0)])
    expected, s, rows = in_numpy(layer, state, tokens)
    found_s, found_rows = parts_of(shape, after)
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(found_s - s).max() < 2e-6 * np.abs(s).max()
    assert np.array_equal(found_rows, rows.astype(np.float32))


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 100])
def test_a_prompt_in_pieces_is_the_prompt_whole_to_the_bit(size: int) -> None:
    layer, state, tokens = Layer(SMALL), State.random(SMALL, 1), Tokens(SMALL, 200, 2)
    (whole,) = run_pass(layer, [(state, tokens, 0)])
    same(in_pieces(layer, state, tokens, size), whole)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_a_sequence_in_company_is_the_sequence_alone_to_the_bit(members: int) -> None:
    layer = Layer(SMALL)
    parts = [
        (State.random(SMALL, seed), Tokens(SMALL, count, seed + 10), draft_tokens)
        for seed, (count, draft_tokens) in enumerate([(1, 0), (33, 0), (5, 4), (1, 0), (16, 0), (2, 2)])
    ]
    for found, part in zip(run_pass(layer, parts, members), parts, strict=True):
        (alone,) = run_pass(layer, [part])
        same(found, alone)
        assert np.array_equal(found[1].pending_rows, alone[1].pending_rows)


@pytest.mark.parametrize("draft_tokens", range(9))
@pytest.mark.parametrize("sure", [0, 1, 2, 12, 18])
def test_right_draft_tokens_leave_the_state_of_those_tokens_to_the_bit(draft_tokens: int, sure: int) -> None:
    if sure + draft_tokens == 0:
        return
    layer, state, tokens = Layer(SMALL), State.random(SMALL, 1), Tokens(SMALL, sure + draft_tokens, 2)
    following = Tokens(SMALL, 5, 3)
    plain_out, plain = token_by_token(layer, state, tokens)
    ((out, after),) = run_pass(layer, [(state, tokens, draft_tokens)])
    assert np.array_equal(out, plain_out)
    if sure:
        assert np.array_equal(after.values, plain[sure].values)
    else:
        assert np.array_equal(after.values[INDEX], state.values[INDEX])
    for right in range(draft_tokens + 1):
        begun = plain[sure + right]
        expected_out, expected = token_by_token(layer, begun, following)
        # The pass after it computes the right ones again, before tokens of its own, with or without draft tokens.
        (found,) = run_pass(layer, [(after.accepting(right), following, 0)])
        same(found, (expected_out, expected[-1]))
        (more,) = run_pass(layer, [(after.accepting(right), following, 4)])
        assert np.array_equal(more[0], found[0])
        (last,) = run_pass(layer, [(more[1].accepting(3), following, 0)])
        same(last, in_pieces(layer, expected[4], following, 1))
        # All of its own tokens can be draft tokens; the right ones are then part of its next state.
        (drafted,) = run_pass(layer, [(after.accepting(right), following, 5)])
        assert np.array_equal(drafted[0], found[0])
        assert np.array_equal(drafted[1].values[INDEX], begun.values[INDEX])


@pytest.mark.parametrize(("count", "drafts"), [(1, 0), (1, 1), (2, 1), (9, 8), (16, 0), (17, 0), (20, 5), (40, 8)])
@pytest.mark.parametrize("shape", [SMALL, Shape(1, 2, 128, 16)], ids=str)
def test_states_that_begin_inside_a_cache_line_are_the_same_to_the_bit(count: int, drafts: int, shape: Shape) -> None:
    layer, tokens = Layer(shape), Tokens(shape, count, 2)
    (aligned,) = run_pass(layer, [(State.random(shape, 1), tokens, drafts)])
    (shifted,) = run_pass(layer, [(State.random(shape, 1, 5), tokens, drafts)], offset=4)
    same(aligned, shifted)
    assert np.array_equal(aligned[1].pending_rows, shifted[1].pending_rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_whatever_the_inputs_nothing_else_is_written(value: float) -> None:
    layer, state, tokens = Layer(SMALL), State.random(SMALL, 1), Tokens(SMALL, 20, 2)
    plain = run_pass(layer, [(State.random(SMALL, 2), tokens.part(3, 9), 3)])[0]
    broken = Tokens(SMALL, 9, 5)
    for part in (broken.projected, broken.b, broken.a):
        part[::2] = value
    for seed in (1, 2):
        state = State.random(SMALL, seed)
        if seed == 2:
            state.values[:] = value
        found = run_pass(layer, [(state, broken, 3), (State.random(SMALL, 2), tokens.part(3, 9), 3)])
        same(found[1], plain)


@pytest.mark.parametrize("size", [20.0, 200.0, 1e30])
def test_large_gates_neither_overflow_nor_become_nan(size: float) -> None:
    layer, state, tokens = Layer(SMALL), State.random(SMALL, 1), Tokens(SMALL, 12, 2)
    for part in (tokens.b, tokens.a):
        part[:] = np.sign(part) * np.float32(size)
    ((out, after),) = run_pass(layer, [(state, tokens, 0)])
    with np.errstate(over="ignore"):
        expected, s, _ = in_numpy(layer, state, tokens)
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(parts_of(SMALL, after)[0] - s).max() < 2e-6 * np.abs(s).max()
