"""Steps of pieces: done when their pieces are, whoever is late, and each piece's results are written once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numba import njit

from npqwen.engine.team import Team
from npqwen.kernels.pieces import (
    STOP,
    Interrupted,
    _acquire,
    claim,
    claim_private,
    finish_first,
    is_needed,
    leave,
    new_state,
    pause,
)

PANELS, STEPS = 20, 30


@njit(nogil=True)
def count_results(team: Any, member: int, late: int, results: Any, wrong: Any, spare: Any) -> None:
    """Every step adds 1 to each of its results; the next counts in `wrong` those that are not 1.

    late: a member that never finishes a piece, but waits until others have. spare: int64 by member, receives how many
    pieces it has computed that another had finished.
    """
    for step in range(results.shape[0]):
        while True:
            piece = claim_private(team, results.shape[1])
            if piece == results.shape[1]:
                break
            while member == late and is_needed(team):
                pause()
            if finish_first(team):
                results[step, piece] += 1
            else:
                spare[member] += 1
        while claim(team, 1) == 0:
            for piece in range(results.shape[1]):
                if results[step, piece] != 1:
                    wrong[0] += 1
    leave(team)


@njit(nogil=True)
def count_without(team: Any, member: int, absent: int, gate: Any, results: Any) -> None:
    """Add 1 to each result, each in a step of its own, `absent` only once the gate is not 0."""
    while member == absent and _acquire(gate, 0) == 0:
        pause()
    for step in range(results.size):
        while claim(team, 1) == 0:
            results[step] += 1
    leave(team)


@pytest.fixture
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    found = Team(request.param)
    yield found
    found.close()


@pytest.mark.parametrize("team", [2, 3, 7], indirect=True)
@pytest.mark.parametrize("on_caller", [False, True])
def test_others_compute_what_a_late_member_holds(team: Team, on_caller: bool) -> None:
    results, wrong = np.zeros((STEPS, PANELS), np.int64), np.zeros(1, np.int64)
    spare = np.zeros(team.threads, np.int64)
    team.run(count_results, team.threads - 1, results, wrong, spare, on_caller=on_caller)
    np.testing.assert_array_equal(results, 1)
    assert wrong[0] == 0


@pytest.mark.parametrize("team", [1, 2, 7], indirect=True)
def test_each_result_is_written_once(team: Team) -> None:
    for _ in range(30):
        results, wrong = np.zeros((STEPS, PANELS), np.int64), np.zeros(1, np.int64)
        team.run(count_results, -1, results, wrong, np.zeros(team.threads, np.int64))
        np.testing.assert_array_equal(results, 1)
        assert wrong[0] == 0


@pytest.mark.parametrize("team", [2, 7], indirect=True)
@pytest.mark.parametrize("on_caller", [False, True])
def test_calls_end_and_begin_without_a_member_that_does_not_arrive(team: Team, on_caller: bool) -> None:
    """It then finds all steps over, those of its own call and not those of a later one."""
    gate, calls = np.zeros(1, np.int64), [np.zeros(50, np.int64) for _ in range(4)]
    try:
        for results in calls:
            team.run(count_without, team.threads - 1, gate, results, on_caller=on_caller)
            np.testing.assert_array_equal(results, 1)
    finally:
        gate[0] = 1
    for _ in range(20):
        after = np.zeros(50, np.int64)
        team.run(count_without, -1, gate, after, on_caller=on_caller)
        np.testing.assert_array_equal(after, 1)
    for results in calls:
        np.testing.assert_array_equal(results, 1)


@pytest.mark.parametrize("pieces", [0, 1, 1000])
def test_a_member_alone_claims_all_pieces_in_order(pieces: int) -> None:
    row = new_state(1)[1]
    for _ in range(3):
        assert [claim(row, pieces) for _ in range(pieces + 1)] == [*range(pieces), pieces]


def test_a_stopped_team_claims_nothing() -> None:
    state = new_state(2)
    assert claim(state[1], 4) == 0
    state[0, STOP] = 1
    with pytest.raises(Interrupted):
        claim(state[1], 4)


def test_a_late_member_passes_over_steps_and_joins_the_running_one() -> None:
    state = new_state(2)
    first, late = state[1], state[2]
    for step in range(5):
        pieces = 1 + step
        for piece in [*range(pieces), pieces]:
            assert claim(first, pieces) == piece
    assert claim(first, 8) == 0
    for step in range(5):
        assert claim(late, 1 + step) == 1 + step
    assert claim(late, 8) == 1
