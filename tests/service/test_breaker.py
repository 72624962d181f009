"""The circuit breaker: when it opens, whom it lets through, and what it learns from."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from neoforge_email.breaker import PROBING, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(3, timedelta(seconds=30), clock)


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.end(breaker.begin(), False)


def test_it_opens_after_failures_in_a_row_and_not_before(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert (breaker.wait(), breaker.is_open) == (0, False)
    fail(breaker)
    assert (breaker.wait(), breaker.is_open) == (30, True)


def test_one_answer_makes_the_count_begin_anew(breaker: Breaker) -> None:
    for _ in range(10):
        fail(breaker, 2)
        breaker.end(breaker.begin(), True)
    assert not breaker.is_open


def test_a_call_that_shows_nothing_changes_nothing(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.end(breaker.begin(), None)
    fail(breaker)
    assert breaker.is_open


def test_half_open_it_lets_one_call_through_at_a_time(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 30
    assert breaker.wait() == 0
    probe = breaker.begin()
    assert breaker.wait() == pytest.approx(PROBING)
    clock.now += 60
    assert breaker.wait() == pytest.approx(PROBING)
    breaker.end(probe, None)
    assert breaker.wait() == 0


def test_a_probe_that_is_answered_closes_it_and_one_that_fails_opens_it_for_as_long_again(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    clock.now += 30
    fail(breaker)
    assert breaker.wait() == 30
    clock.now += 30
    breaker.end(breaker.begin(), True)
    assert (breaker.wait(), breaker.is_open) == (0, False)
    fail(breaker, 2)
    assert not breaker.is_open


@pytest.mark.parametrize("healthy", [True, False])
def test_what_was_under_way_when_it_opened_says_nothing_any_more(breaker: Breaker, clock: Clock, healthy: bool) -> None:
    late = [breaker.begin() for _ in range(8)]
    fail(breaker, 3)
    clock.now += 29
    for era in late:
        breaker.end(era, healthy)
    assert (breaker.wait(), breaker.is_open) == (1, True)


def test_a_pause_keeps_calls_away_without_opening_it(breaker: Breaker, clock: Clock) -> None:
    breaker.pause(10)
    breaker.pause(5)
    assert (breaker.wait(), breaker.is_open) == (10, False)
    clock.now += 10
    assert breaker.wait() == 0


def test_a_pause_outlasts_an_opening_and_an_opening_a_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    breaker.pause(100)
    assert breaker.wait() == 100
    clock.now += 100
    fail(breaker)
    breaker.pause(1)
    assert breaker.wait() == 30


class AnyCourse(RuleBasedStateMachine):
    """Whatever happens, nobody is called too early, by two probes at once, or never again."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(3, timedelta(seconds=30), self.clock)
        self.under_way: list[tuple[int, bool]] = []  # each with whether it is a probe
        self.opened_at = self.paused_until = -math.inf
        self.failed = 0

    @rule()
    def begin(self) -> None:
        if self.breaker.wait():
            return
        assert self.clock.now >= max(self.opened_at + 30, self.paused_until) - 1e-6
        is_probe = self.breaker.is_open
        assert not (is_probe and any(other for _, other in self.under_way))
        self.under_way.append((self.breaker.begin(), is_probe))

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(seconds=st.floats(0, 40))
    def pause(self, seconds: float) -> None:
        self.breaker.pause(seconds)
        self.paused_until = max(self.paused_until, self.clock.now + seconds)

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 7), healthy=st.sampled_from([True, False, None]))
    def end(self, number: int, healthy: bool | None) -> None:
        was_open = self.breaker.is_open
        era, is_probe = self.under_way.pop(number % len(self.under_way))
        self.breaker.end(era, healthy)
        self.failed = 0 if healthy else self.failed + (healthy is False)
        if self.breaker.is_open and not was_open:
            assert self.failed >= 3
        if was_open and not self.breaker.is_open:
            assert is_probe
            assert healthy
        if self.breaker.is_open and healthy is False and (is_probe or not was_open):
            self.opened_at = self.clock.now

    def teardown(self) -> None:
        for era, _ in self.under_way:
            self.breaker.end(era, None)
        self.clock.now += self.breaker.wait()
        assert self.breaker.wait() == pytest.approx(0, abs=1e-6)


TestAnyCourse = AnyCourse.TestCase
