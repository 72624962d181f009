"""`why`: one sentence for every state, from the table of all of them to what a database really holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoforge_email import records
from neoforge_email.lifecycle import QueueState, Status
from neoforge_email.providers.base import Outcome
from neoforge_email.why import MANY, Operator, Situation, discreet, explain, parse_id

from .test_settlement import Way, way

__all__ = ["way"]  # a fixture

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ID = UUID("019ca8f2-6bd2-7aaa-8bbb-0123456789ab")
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
OPERATOR = Operator(ahead=0, workers=2, owner="app1-1")
WAITING = Situation(
    ID,
    NOW,
    recipients={Status.QUEUED: 1},
    state=QueueState.QUEUED,
    since=NOW - 4 * SECOND,
    due=NOW - 4 * SECOND,
    expires_at=NOW + 22 * HOUR + MINUTE,
    operator=OPERATOR,
)
DEFERRED = replace(
    WAITING,
    state=QueueState.SCHEDULED,
    recipients={Status.DEFERRED: 1},
    tries=2,
    due=NOW + 3 * MINUTE,
    provider="smtp",
    answer="451 4.7.1 greylisted",
)
LEASED = replace(WAITING, state=QueueState.LEASED, lease_until=NOW + 50 * SECOND, attempt=3)
SENDING = replace(LEASED, attempt_at=NOW - 2 * SECOND, attempt_provider="smtp")
UNSURE = replace(
    WAITING,
    state=QueueState.UNCERTAIN,
    recipients={Status.UNCERTAIN: 1},
    since=NOW - 2 * MINUTE,
    due=NOW + 3 * MINUTE,
    tries=1,
    attempt=3,
    attempt_provider="sendgrid",
)
HELD = replace(WAITING, state=QueueState.HELD, since=NOW - 5 * HOUR, held_reason="no attempt got an answer")
MAYBE = "Attempt 3 with sendgrid ended 2 minutes ago without an answer, so it may have been sent; "
DECIDE = f"`neoforge uncertain resend {ID}` sends it"

TABLE: dict[str, tuple[Situation, str]] = {
    "unknown": (
        Situation(ID, NOW, known=False),
        f"There is no message {ID}: none was accepted under this id, or it is older than what is kept.",
    ),
    "done": (
        Situation(ID, NOW, recipients={Status.DELIVERED: 2, Status.BOUNCED: 1}),
        "Done: 1 bounced, 2 delivered; only a provider's event can still change that.",
    ),
    "suppressed": (
        Situation(ID, NOW, recipients={Status.SUPPRESSED: 1}),
        "Done: 1 suppressed; only a provider's event can still change that.",
    ),
    "lost": (
        Situation(ID, NOW, recipients={Status.QUEUED: 1, Status.SENT: 1}, operator=OPERATOR),
        (
            "Stuck: 1 of 2 recipients still to be sent to, but the message is not in the queue, and no rule will put it there"
            " again; `neoforge reconcile` reports it."
        ),
    ),
    "nobody": (
        Situation(ID, NOW, recipients={}),
        "Nothing will ever be sent: the message has no recipients, which no rule mends.",
    ),
    "queued": (
        WAITING,
        (
            "Waiting for a worker for 4 seconds, with no message due before it in its lane; 2 workers listen, and one that can"
            " reach its provider takes up what is due within a second; the message expires in 22 hours."
        ),
    ),
    "queued behind others, one worker": (
        replace(WAITING, operator=replace(OPERATOR, ahead=1, workers=1)),
        (
            "Waiting for a worker for 4 seconds, with 1 message due before it in its lane; 1 worker listens, and one that"
            " can reach its provider takes up what is due within a second; the message expires in 22 hours."
        ),
    ),
    "queued behind very many, no worker": (
        replace(WAITING, operator=replace(OPERATOR, ahead=MANY + 1, workers=0)),
        (
            "Waiting for a worker for 4 seconds, with more than 10000 messages due before it in its lane; no worker listens, so"
            " nothing moves until one is started; the message expires in 22 hours."
        ),
    ),
    "queued, Redis away": (
        replace(WAITING, operator=replace(OPERATOR, ahead=7, workers=None)),
        (
            "Waiting for a worker for 4 seconds, with 7 messages due before it in its lane; Redis does not answer, so nobody"
            " knows whether workers listen; the message expires in 22 hours."
        ),
    ),
    "queued, as its user sees it": (
        replace(WAITING, operator=None),
        "Waiting for a worker for 4 seconds, and sent as soon as one is free; the message expires in 22 hours.",
    ),
    "queued after refusals": (
        replace(WAITING, tries=1, provider="smtp", answer="451 later", operator=None),
        (
            "Waiting for a worker for 4 seconds after it was deferred once, last by smtp (451 later), and sent as soon as one is"
            " free; the message expires in 22 hours."
        ),
    ),
    "queued and expired": (
        replace(WAITING, expires_at=NOW - MINUTE, operator=None),
        "Waiting for a worker for 4 seconds; it expired 60 seconds ago and is ended within a minute if a worker runs.",
    ),
    "scheduled": (
        DEFERRED,
        (
            "Deferred 2 times, last by smtp (451 4.7.1 greylisted); the next attempt is due in 3 minutes and the message expires"
            " in 22 hours."
        ),
    ),
    "scheduled and due": (
        replace(DEFERRED, due=NOW - 5 * SECOND),
        (
            "Deferred 2 times, last by smtp (451 4.7.1 greylisted); the next attempt has been due for 5 seconds and begins when a"
            " worker runs; the message expires in 22 hours."
        ),
    ),
    "scheduled after its end": (
        replace(DEFERRED, expires_at=NOW + 2 * MINUTE),
        "Deferred 2 times, last by smtp (451 4.7.1 greylisted); no further attempt is due before it expires in 2 minutes.",
    ),
    "scheduled after a connection that failed": (
        replace(DEFERRED, tries=0, answer="connection refused"),
        (
            "Put off by smtp (connection refused), which counts as no refusal; the next attempt is due in 3 minutes and the"
            " message expires in 22 hours."
        ),
    ),
    "scheduled before any attempt": (
        replace(DEFERRED, tries=0, answer=None, provider=None),
        "Put off before any attempt; the next attempt is due in 3 minutes and the message expires in 22 hours.",
    ),
    "leased": (
        LEASED,
        (
            "Held by worker app1-1 for 4 seconds, on a lease that lasts 50 seconds more unless renewed; it has not begun to send"
            " it."
        ),
    ),
    "leased, as its user sees it, and one recipient suppressed": (
        replace(LEASED, recipients={Status.QUEUED: 2}, suppressed=1, operator=None),
        (
            "Held by a worker for 4 seconds, on a lease that lasts 50 seconds more unless renewed; it has not begun to send it;"
            " 1 of 2 recipients still open will not be sent to, being on the suppression list."
        ),
    ),
    "being sent": (
        SENDING,
        (
            "Held by worker app1-1 for 4 seconds, on a lease that lasts 50 seconds more unless renewed; attempt 3 with smtp began"
            " 2 seconds ago, and its answer decides."
        ),
    ),
    "lost before its attempt": (
        replace(LEASED, lease_until=NOW - 3 * SECOND),
        (
            "Held by worker app1-1 for 4 seconds, whose lease ran out 3 seconds ago, before an attempt began; the next sweep of"
            " any worker gives it to another."
        ),
    ),
    "lost in its attempt": (
        replace(SENDING, lease_until=NOW - SECOND),
        (
            "Held by worker app1-1 for 4 seconds, whose lease ran out 1 second ago, after attempt 3 with smtp began; the next"
            " sweep of any worker makes it uncertain."
        ),
    ),
    "leased for ever": (
        replace(LEASED, lease_until=None),
        "Held by worker app1-1 for 4 seconds on a lease without an end, so only that worker's answer or its restart moves it.",
    ),
    "uncertain": (
        UNSURE,
        MAYBE
        + "it waits 3 minutes more for an event of the provider, and then it is sent again with the same Message-ID, as its"
        " policy is to resend.",
    ),
    "uncertain, to be held": (
        replace(UNSURE, holds=True),
        MAYBE
        + "it waits 3 minutes more for an event of the provider, and then an operator has to decide, as its policy is to hold.",
    ),
    "uncertain once too often": (
        replace(UNSURE, tries=4),
        MAYBE
        + "it waits 3 minutes more for an event of the provider, and then an operator has to decide, as no attempt got an"
        " answer.",
    ),
    "uncertain and due": (
        replace(UNSURE, due=NOW),
        MAYBE
        + "no event came in time, and when a worker runs it is sent again with the same Message-ID, as its policy is to"
        " resend.",
    ),
    "held": (
        replace(HELD, confirmable=True),
        (
            f"Held for 5 hours until an operator decides (no attempt got an answer); {DECIDE} again and `neoforge uncertain"
            f" confirm {ID}` says that it arrived."
        ),
    ),
    "held before any attempt": (
        replace(HELD, held_reason="it cannot be read"),
        f"Held for 5 hours until an operator decides (it cannot be read); {DECIDE}, as no attempt can have been taken.",
    ),
    "held, as its user sees it": (
        replace(HELD, operator=None, confirmable=True),
        (
            "Held for 5 hours until an operator decides (no attempt got an answer); an event of the provider would still settle"
            " it."
        ),
    ),
    "decided, and still queued": (
        replace(WAITING, recipients={Status.SENT: 1}),
        "1 sent, and the message leaves the queue when a worker next takes it up.",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_state_has_its_sentence(name: str) -> None:
    situation, sentence = TABLE[name]
    assert explain(situation) == sentence


moments = st.none() | st.datetimes(datetime(2020, 1, 1), datetime(2032, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
words = st.none() | st.text(max_size=300)
situations = st.builds(
    Situation,
    id=st.just(ID),
    now=st.just(NOW),
    known=st.booleans(),
    recipients=st.none() | st.dictionaries(st.sampled_from(Status), st.integers(0, 50)),
    suppressed=st.integers(0, 50),
    answer=words,
    provider=words,
    confirmable=st.booleans(),
    state=st.none() | st.sampled_from(QueueState),
    since=moments,
    due=moments,
    expires_at=moments,
    tries=st.integers(0, 10),
    holds=st.booleans(),
    held_reason=words,
    attempt=st.integers(0, 10),
    attempt_at=moments,
    attempt_provider=words,
    lease_until=moments,
    operator=st.none()
    | st.builds(Operator, ahead=st.integers(0, MANY + 1), workers=st.none() | st.integers(0, 9), owner=words),
)


@given(situations)
def test_whatever_the_state_there_is_one_sentence_on_one_line(situation: Situation) -> None:
    sentence = explain(situation)
    assert len(sentence) > 10
    assert len(sentence.splitlines()) == 1
    assert sentence[0] == sentence[0].upper()
    assert sentence.endswith(".")
    assert "None" not in sentence.replace(str(situation.answer), "")


@pytest.mark.parametrize(
    "text",
    [
        str(ID),
        str(ID).upper(),
        ID.hex,
        f" {ID.hex}-7 ",
        f"<{ID.hex}@example.com>",
        f"{ID.hex}@example.com",
        f"bounce+{ID.hex}-12@bounces.example.com",
    ],
)
def test_a_message_is_known_by_every_name_that_it_goes_by(text: str) -> None:
    assert parse_id(text) == ID


@pytest.mark.parametrize("text", ["", "7", "ada@example.net", ID.hex[:-1], f"{ID.hex}0", f"{ID.hex}-x", f"x{ID.hex}"])
def test_what_names_no_message_is_refused(text: str) -> None:
    assert parse_id(text) is None


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("ada@example.net", "…@example.net"),
        ("550 5.1.1 <o'brien+x@example.net>: no such user", "550 5.1.1 <…@example.net>: no such user"),
        ('RCPT TO:<"a \\" b"@example.net> (ada@[192.0.2.1])', "RCPT TO:<…@example.net> (…@[192.0.2.1])"),
        ("451 4.7.1 greylisted @ noon", "451 4.7.1 greylisted @ noon"),
    ],
)
def test_of_an_address_an_operator_sees_the_domain(told: str, shown: str) -> None:
    assert discreet(told) == shown


async def test_the_sentence_follows_a_message_on_its_way(way: Way) -> None:
    async def told() -> str:
        """The sentence for the operator, once the one for the user is known to say the same without a worker's name."""
        email_id = await way.superuser.fetchval("select id from email_messages")
        examined = await records.examine(way.superuser, email_id, workers=1, max_retries=3)
        email = await records.get_email(way.api, 1, email_id, {}, max_retries=3)
        assert email is not None
        assert email.why[:20] == explain(replace(examined.situation, operator=None))[:20]
        assert "worker w" not in email.why
        assert [entry.type for entry in email.timeline] == [entry.type for entry in examined.timeline]
        assert {entry.recipient for entry in examined.timeline} <= {None, "…@example.net"}
        assert await records.get_email(way.api, 2, email_id, {}, max_retries=3) is None
        return explain(examined.situation)

    await way.accept("ada@example.net", on_uncertain="hold")
    assert "no message due before it in its lane; 1 worker listens" in await told()
    claimed = await way.attempt()
    assert (await told()).startswith("Held by worker w for less than a second, on a lease that lasts 59 seconds more")
    await way.answer(claimed, Outcome.DEFERRED)
    assert (await told()).startswith("Deferred once, last by sendgrid (words); the next attempt has been due for")
    await way.sweep()
    assert "after it was deferred once, last by sendgrid (words)" in await told()
    await way.attempt()
    await way.lose(waits=True)
    assert "it waits 4 minutes more for an event of the provider, and then an operator has to decide" in await told()
    await way.superuser.execute("update email_queue set due = now()")
    await way.sweep()
    assert "`neoforge uncertain confirm" in await told()
    await way.superuser.execute(
        "insert into suppressions (user_id, address, reason) values (1, 'ada@example.net', 'bounce')"
    )
    assert "; 1 of 1 recipient still open will not be sent to" in await told()
    await way.superuser.fetchval("select confirm(array_agg(id)) from email_queue")
    assert await told() == "Done: 1 sent; only a provider's event can still change that."


async def test_what_is_missing_is_said(way: Way) -> None:
    async def told(email_id: UUID) -> str:
        return explain((await records.examine(way.superuser, email_id, workers=1, max_retries=3)).situation)

    assert (await told(ID)).startswith(f"There is no message {ID}")
    assert (await told(UUID(int=2**128 - 1))).startswith("There is no message")
    await way.accept()
    email_id = await way.superuser.fetchval("select id from email_messages")
    await way.superuser.execute("delete from email_queue")
    assert (await told(email_id)).startswith("Stuck: 1 of 1 recipient")
    await way.superuser.execute("delete from email_tracking")
    assert (await told(email_id)).startswith("Nothing will ever be sent")


async def test_messages_before_one_in_its_lane_are_counted(way: Way) -> None:
    for _ in range(3):
        await way.accept()
    last = await way.superuser.fetchval("select id from email_queue order by due desc, id desc limit 1")
    examined = await records.examine(way.superuser, last, workers=1, max_retries=3)
    assert "with 2 messages due before it" in explain(examined.situation)
