"""What an attempt's results make of a message."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoforge_email.lifecycle import Backoff, QueueState, Status, decide
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope

BACKOFF = Backoff(
    delay=timedelta(seconds=60),
    max_delay=timedelta(seconds=3600),
    base=2,
    max_retries=3,
    error_interval=timedelta(seconds=5),
    uncertain_wait=timedelta(0),
)

RESULTS = st.builds(Result, st.sampled_from(Outcome), st.sampled_from(Scope), st.just("words"))


def result(outcome: Outcome, scope: Scope = Scope.MESSAGE) -> Result:
    return Result(outcome, scope, "words")


def test_a_message_that_was_taken_for_all_is_done() -> None:
    decision = decide([result(Outcome.TAKEN), result(Outcome.TAKEN)], 0, BACKOFF, 0, reports=False)
    assert decision.state is None
    assert [verdict.status for verdict in decision.recipients] == [Status.SENT, Status.SENT]


def test_a_refused_recipient_bounces_and_does_not_hold_up_the_others() -> None:
    decision = decide([result(Outcome.REFUSED, Scope.RECIPIENT), result(Outcome.TAKEN)], 0, BACKOFF, 0, reports=False)
    assert decision.state is None
    assert [verdict.status for verdict in decision.recipients] == [Status.BOUNCED, Status.SENT]


def test_a_refused_message_fails() -> None:
    assert decide([result(Outcome.REFUSED)], 0, BACKOFF, 0, reports=False).recipients[0].status is Status.FAILED


def test_refusals_are_tried_again_later_and_later_and_then_given_up() -> None:
    delays = []
    tries = 0
    while True:
        decision = decide([result(Outcome.DEFERRED)], tries, BACKOFF, 0, reports=False)
        tries = decision.tries
        if decision.state is None:
            break
        delays.append(decision.delay.total_seconds())
    assert delays == [60, 120, 240]
    assert decision.recipients[0].status is Status.FAILED


@pytest.mark.parametrize("tries", [0, 3, 1000])
def test_a_lost_connection_uses_up_no_retry(tries: int) -> None:
    decision = decide([result(Outcome.DEFERRED, Scope.CONNECTION)], tries, BACKOFF, 0, reports=False)
    assert (decision.state, decision.tries, decision.delay) == (QueueState.SCHEDULED, tries, BACKOFF.error_interval)
    assert decision.recipients[0].status is Status.DEFERRED


def test_a_message_whose_turn_never_came_is_as_it_was() -> None:
    decision = decide([NOT_STARTED, NOT_STARTED], 2, BACKOFF, 0, reports=False)
    assert (decision.state, decision.tries, decision.recipients) == (QueueState.QUEUED, 2, ())


def test_an_attempt_without_an_answer_is_uncertain_even_if_another_recipient_was_refused() -> None:
    decision = decide(
        [result(Outcome.REFUSED, Scope.RECIPIENT), result(Outcome.UNCERTAIN)], 0, BACKOFF, 0, reports=False
    )
    assert (decision.state, decision.tries) == (QueueState.UNCERTAIN, 1)
    assert [verdict.status for verdict in decision.recipients] == [Status.BOUNCED, Status.UNCERTAIN]


@given(results=st.lists(RESULTS, min_size=1, max_size=5), tries=st.integers(0, 10), jitter=st.floats(0, 0.999))
def test_a_message_is_done_exactly_when_nobody_is_left_to_be_addressed(
    results: list[Result], tries: int, jitter: float
) -> None:
    decision = decide(results, tries, BACKOFF, jitter, reports=False)
    assert len(decision.recipients) == len(results)
    still_open = any(verdict.status.open for verdict in decision.recipients)
    assert (decision.state is None) == (not still_open)
    assert decision.tries in {tries, tries + 1}
    assert timedelta(0) <= decision.delay <= BACKOFF.max_delay
    for before, after in zip(results, decision.recipients, strict=True):
        assert (before.outcome is Outcome.TAKEN) == (after.status is Status.SENT)


@given(tries=st.integers(1, 10_000), jitter=st.floats(0, 0.999))
def test_the_wait_is_never_longer_than_the_longest_nor_shorter_than_four_fifths_of_the_first(
    tries: int, jitter: float
) -> None:
    assert 0.8 * BACKOFF.delay <= BACKOFF.after(tries, jitter) <= BACKOFF.max_delay
