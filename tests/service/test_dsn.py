"""Bounces and complaints by mail, read from fixtures in the forms of the mail systems that write them, and from garbage."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neoforge_email.inbound import Event
from neoforge_email.inbound.dsn import Envelope, event_id, normalise, pack, unpack, verp_attempt
from neoforge_email.lifecycle import EventType

FIXTURES = Path(__file__).parent / "dsn"
ATTEMPT = "0199c0de5eed7abc8def0123456789ab-2"
RETURN_PATH = f"bounce+{ATTEMPT}@bounces.example.com"
FEEDBACK = "fbl@bounces.example.com"
RECEIVED = datetime(2026, 3, 5, 12, 0, tzinfo=UTC)


def mail(name: str) -> bytes:
    """A fixture as it comes over the wire."""
    return (FIXTURES / f"{name}.eml").read_bytes().replace(b"\n", b"\r\n")


def read(content: bytes, to: str = RETURN_PATH) -> list[Event]:
    return normalise(pack(Envelope(to, "192.0.2.25", RECEIVED), content))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


BOUNCE, DEFERRED, DELIVERED = EventType.BOUNCE, EventType.DEFERRED, EventType.DELIVERED
SPAM, UNSUBSCRIBE = EventType.SPAM_REPORT, EventType.UNSUBSCRIBE
ADA, BOB = "ada@example.net", "bob@example.org"
PERMANENT, NOT_PERMANENT = True, False
T = "2026-03-02T08:15:05"

# what each recipient of a fixture gets: event, address, whether it suppresses, the beginning of the response, the time
REPORTS: dict[str, list[tuple[EventType, str | None, bool, str | None, str]]] = {
    "postfix": [(BOUNCE, "smtp-550@dead.example.com", PERMANENT, "550 5.1.1 As this address asks for", T)],
    "postfix-failed": [(BOUNCE, ADA, PERMANENT, "550 5.1.1 <ada@example.net>: Recipient address rejected:", T)],
    "postfix-several": [
        (BOUNCE, ADA, NOT_PERMANENT, "552 5.2.2 <ada@example.net>: Quota exceeded", T),
        (BOUNCE, BOB, PERMANENT, "Host or domain name not found. Name service error", T),
        (BOUNCE, "cy@example.org", NOT_PERMANENT, "connect to mx.example.org[198.51.100.4]:25:", T),
        (BOUNCE, "dee@example.net", NOT_PERMANENT, "550 5.7.1 Service unavailable; client", T),
    ],
    "postfix-delayed": [(DEFERRED, ADA, NOT_PERMANENT, "450 4.2.0 <ada@example.net>", "2026-03-02T12:16:00")],
    "postfix-smtputf8": [(BOUNCE, "jörg@xn--bcher-kva.example.net", PERMANENT, "550 5.1.1 <jörg@bücher", T)],
    "exim-failed": [(BOUNCE, ADA, PERMANENT, "550 No such user here", "2026-03-02T08:15:07")],
    "exim-without-report": [
        (BOUNCE, ADA, NOT_PERMANENT, "retry timeout exceeded", "2026-03-02T08:15:07"),
        (BOUNCE, BOB, PERMANENT, "550 5.1.1 <bob@example.org>: User unknown", "2026-03-02T08:15:07"),
    ],
    "exchange-online-failed": [(BOUNCE, ADA, PERMANENT, "550 5.1.10 RESOLVER.ADR", "2026-03-02T08:15:06")],
    "exchange-expired": [(BOUNCE, ADA, NOT_PERMANENT, "550 4.4.7 QUEUE.Expired", "2026-03-04T08:10:00")],
    "exchange-generic": [(BOUNCE, ADA, NOT_PERMANENT, "550 5.7.520 Access denied", "2026-03-02T08:15:06")],
    "google-failed": [(BOUNCE, ADA, PERMANENT, "550-5.2.1 The email account that you tried to reach is inactive", T)],
    "google-too-much-mail": [(BOUNCE, ADA, NOT_PERMANENT, "550-5.2.1 The user you are trying to contact is", T)],
    "google-empty-report": [(BOUNCE, ADA, NOT_PERMANENT, None, "2026-03-02T08:15:06")],
    "google-delayed": [(DEFERRED, ADA, NOT_PERMANENT, "The recipient server did not", "2026-03-03T08:15:05")],
    "yahoo-failed": [(BOUNCE, ADA, PERMANENT, "554 delivery error: dd This user", "2026-03-02T08:15:08")],
    "qmail": [
        (BOUNCE, ADA, PERMANENT, "550 5.1.1 <ada@example.net>... User unknown", "2026-03-02T08:15:09"),
        (BOUNCE, "bob@mail.example.org", PERMANENT, "Sorry, no mailbox here by that name.", "2026-03-02T08:15:09"),
        (BOUNCE, "cy@example.org", NOT_PERMANENT, "I'm not going to try again;", "2026-03-02T08:15:09"),
    ],
    "sendmail-failed": [(BOUNCE, "Ada.L+news@example.net", PERMANENT, "550 5.1.1", "2026-03-02T08:15:08")],
    "sendmail-delivered": [(DELIVERED, "Ada.L+news@example.net", NOT_PERMANENT, "250 2.0.0 Ok", "2026-03-02T08:15:08")],
    "broken-cut-off": [(BOUNCE, ADA, PERMANENT, "5.1.1", T)],
    "broken-one-block": [(BOUNCE, ADA, PERMANENT, "550 5.1.1 <ada@example.net>", T)],
    "broken-no-recipient": [(BOUNCE, None, PERMANENT, "550 5.1.1", T)],
}
COMPLAINTS: dict[str, list[tuple[EventType, str | None, str]]] = {
    "arf-yahoo": [(SPAM, ADA, "feedback report: abuse")],
    "arf-masked": [(SPAM, None, "feedback report: abuse")],
    "jmrp-before-2026": [(SPAM, ADA, "complaint about message from 192.0.2.10")],
    "arf-several": [(SPAM, ADA, "feedback report: fraud"), (SPAM, BOB, "feedback report: fraud")],
    "arf-opt-out": [(UNSUBSCRIBE, ADA, "feedback report: opt-out")],
    "arf-not-spam": [],
    "arf-auth-failure": [],
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_delivery_report_becomes_an_event_for_each_recipient(name: str) -> None:
    events = read(mail(name))
    assert [(event.type, event.recipient, event.permanent, event.occurred_at) for event in events] == [
        (type_, recipient, permanent, at(occurred)) for type_, recipient, permanent, _, occurred in REPORTS[name]
    ]
    for event, (*_, response, _occurred) in zip(events, REPORTS[name], strict=True):
        assert (event.response or "").startswith(response or "")
        assert (event.response is None) == (response is None)
        assert "\n" not in (event.response or "")
        assert (event.provider, event.attempt, event.provider_message_id) == ("mail", ATTEMPT, None)


@pytest.mark.parametrize("name", COMPLAINTS)
@pytest.mark.parametrize("to", [FEEDBACK, "abuse@bounces.example.com", RETURN_PATH])
def test_a_feedback_report_becomes_a_complaint_of_the_message_that_came_back(name: str, to: str) -> None:
    events = read(mail(name), to)
    assert [(event.type, event.recipient, event.response) for event in events] == COMPLAINTS[name]
    assert {event.attempt for event in events} <= {ATTEMPT}
    assert all(event.occurred_at == at("2026-03-03T10:00:00") and not event.permanent for event in events)


@pytest.mark.parametrize("name", ["vacation", "letter", "read-receipt"])
def test_an_answer_to_the_return_path_is_no_event(name: str) -> None:
    assert read(mail(name)) == []


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("broken-no-report", RETURN_PATH, "a bounce in a form"),
        ("broken-unknown-form", RETURN_PATH, "a bounce in a form"),
        ("broken-action", RETURN_PATH, "a bounce in a form"),
        ("broken-feedback", FEEDBACK, "without Feedback-Type"),
        ("letter", "abuse@bounces.example.com", "a letter, not a report"),
        ("vacation", FEEDBACK, "a letter, not a report"),
    ],
)
def test_a_report_that_cannot_be_read_says_why(name: str, to: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(mail(name), to)


def test_every_fixture_is_used() -> None:
    used = {*REPORTS, *COMPLAINTS, "vacation", "letter", "read-receipt", "broken-no-report", "broken-unknown-form"}
    assert used | {"broken-action", "broken-feedback"} == {path.stem for path in FIXTURES.glob("*.eml")}


def test_details_say_who_reported_what() -> None:
    [event] = read(mail("postfix-delayed"))
    assert event.detail == {
        "status": "4.2.0",
        "reporting_mta": "mail.example.com",
        "remote_mta": "mx.example.net",
        "retries_until": "Sat, 7 Mar 2026 09:15:01 +0100 (CET)",
    }
    [complaint] = read(mail("arf-opt-out"), FEEDBACK)
    assert complaint.detail == {
        "feedback_type": "opt-out",
        "user_agent": "SomeGenerator/1.0",
        "source": "feedback@arf.example.net",
    }


def test_the_return_path_names_the_attempt_even_where_another_message_came_back() -> None:
    other = mail("postfix-failed").replace(
        f"X-NeoForge-Attempt: {ATTEMPT}".encode(), b"X-NeoForge-Attempt: " + b"1" * 32 + b"-1"
    )
    assert [event.attempt for event in read(other)] == [ATTEMPT]


def test_without_a_return_path_the_message_that_came_back_names_the_attempt() -> None:
    assert [event.attempt for event in read(mail("postfix-failed"), "postmaster@bounces.example.com")] == [ATTEMPT]
    by_return_path = mail("arf-yahoo").replace(b"X-NeoForge-Attempt", b"X-Other")
    assert [event.attempt for event in read(by_return_path, FEEDBACK)] == [ATTEMPT]
    with pytest.raises(ValueError, match="names no message of ours"):
        read(by_return_path.replace(b"Return-Path: <bounce+", b"X: <bounce+"), FEEDBACK)


def test_a_report_inside_the_message_that_came_back_is_not_the_reporters_word() -> None:
    inner = mail("postfix-failed")
    outer = b"From: Ada <ada@example.net>\r\nContent-Type: multipart/mixed; boundary=outer\r\n\r\n--outer\r\n"
    outer += b"Content-Type: message/rfc822\r\n\r\n" + inner + b"\r\n--outer--\r\n"
    assert read(outer) == []


def test_the_events_of_a_receipt_are_numbered() -> None:
    content = mail("postfix-several")
    identity = event_id(RETURN_PATH, content)
    assert [event.event_id for event in read(content)] == [f"{identity}.{number}" for number in range(1, 5)]


def test_a_mail_that_comes_again_over_other_relays_has_the_same_id_and_another_mail_another() -> None:
    content = mail("postfix-failed")
    again = b"Received: from x by y; Mon, 2 Mar 2026 10:00:00 +0000\r\nDKIM-Signature: v=1; b=eA==\r\n" + content
    identity = event_id(RETURN_PATH, content)
    assert event_id(RETURN_PATH.upper(), again) == identity
    assert event_id(RETURN_PATH, content.replace(b"\r\n", b"\n")) == identity
    for other in (
        content.replace(b"Message-Id: <2026", b"Message-Id: <2027"),
        content.replace(b"5.1.1", b"5.1.2"),
        mail("postfix-delayed"),
    ):
        assert event_id(RETURN_PATH, other) != identity
    assert event_id(FEEDBACK, content) != identity


@pytest.mark.parametrize(
    ("status", "said", "permanent"),
    [
        ("5.1.2", "", PERMANENT),
        ("5.1.3", "501 5.1.3 Bad recipient address syntax", PERMANENT),
        ("5.1.6", "", PERMANENT),
        ("5.1.10", "550 5.1.10 null MX", PERMANENT),
        ("5.2.1", "550 5.2.1 Mailbox disabled", PERMANENT),
        ("5.0.0", "550 5.1.1 unknown", PERMANENT),
        ("5.0.0", "550 Invalid Recipient", PERMANENT),
        ("5.0.0", "550 Unrouteable address", PERMANENT),
        ("", "550 Unknown user", PERMANENT),
        ("5.4.1", "550 5.4.1 Recipient address rejected: Access denied. [mx.example.net]", PERMANENT),
        ("5.5.0", "550 5.5.0 Requested action not taken: mailbox unavailable (S2017062302).", PERMANENT),
        ("5.1.0", "550 #5.1.0 Address rejected.", NOT_PERMANENT),
        ("5.1.0", "550 5.1.0 Sender address rejected: User unknown", NOT_PERMANENT),
        ("5.1.7", "550 5.1.7 Invalid address", NOT_PERMANENT),
        ("5.1.8", "550 5.1.8 Sender domain not found", NOT_PERMANENT),
        ("5.2.2", "552 5.2.2 Mailbox full", NOT_PERMANENT),
        ("5.2.3", "552 5.2.3 Message too large", NOT_PERMANENT),
        ("5.3.4", "552 5.3.4 Message too big for system", NOT_PERMANENT),
        ("5.4.6", "554 5.4.6 Too many hops", NOT_PERMANENT),
        ("5.6.1", "550 5.6.1 Media not supported", NOT_PERMANENT),
        ("5.7.1", "550 5.7.1 User unknown or spam", NOT_PERMANENT),
        ("5.7.26", "550 5.7.26 Unauthenticated", NOT_PERMANENT),
        ("5.0.0", "554 rejected as spam", NOT_PERMANENT),
        ("5.0.0", "550 Requested action not taken: mailbox unavailable", NOT_PERMANENT),
        ("5.0.0", "452 4.2.2 over quota", NOT_PERMANENT),
        ("5.0.0", "", NOT_PERMANENT),
        ("5.0.0", "450 User unknown in local recipient table", NOT_PERMANENT),
        ("4.4.7", "delivery time expired", NOT_PERMANENT),
        ("4.1.1", "450 4.1.1 User unknown", NOT_PERMANENT),
        ("", "see 10.5.1.1 or 5.1.1.9 or 15.1.1", NOT_PERMANENT),
    ],
)
def test_only_a_failure_of_the_address_itself_is_permanent(status: str, said: str, permanent: bool) -> None:
    report = f"Content-Type: message/delivery-status\n\nReporting-MTA: dns; a\n\nFinal-Recipient: rfc822; {ADA}\nAction: failed\n"
    [event] = read(f"{report}Status: {status}\nDiagnostic-Code: smtp; {said}\n".encode())
    assert (event.type, event.permanent) == (BOUNCE, permanent)


@pytest.mark.parametrize(
    ("field", "recipient"),
    [
        ("Final-Recipient: rfc822;ada@example.net", ADA),
        ("Final-Recipient: RFC822; <ada@example.net>", ADA),
        ("Final-Recipient: ada@example.net", ADA),
        ("Final-Recipient: rfc822; ada@example.net (Ada)", ADA),
        ("Final-Recipient: rfc822; user@mail.example.org\nOriginal-Recipient: rfc822; ada@example.net", ADA),
        ("Final-Recipient: rfc822; ada@example.net\nOriginal-Recipient: rfc822;", ADA),
        (
            "Final-Recipient: rfc822; a@example.net\nOriginal-Recipient: rfc822; ada+3Dx+2By@example.net",
            "ada=x+y@example.net",
        ),
        (
            "Final-Recipient: rfc822; ada+2B@example.net\nOriginal-Recipient: rfc822; ada+2B@example.net",
            "ada+2B@example.net",
        ),
        ("Final-Recipient: utf-8; j\\x{F6}rg@example.net", "jörg@example.net"),
        ("Final-Recipient: utf-8; \\x{D800}@example.net", "\\x{D800}@example.net"),
        ("Final-Recipient: rfc822; nobody", None),
        ("Final-Recipient: rfc822; @example.net", None),
        ("Final-Recipient: rfc822; redacted@example.net", None),
        ("Final-Recipient: rfc822; a\x07b@example.net", None),
        ("Final-Recipient: rfc822; " + "a" * 400 + "@example.net", None),
    ],
)
def test_the_recipient_is_the_one_that_the_message_was_sent_to(field: str, recipient: str | None) -> None:
    [event] = read(
        f"Content-Type: message/delivery-status\n\nReporting-MTA: dns; a\n\n{field}\nAction: failed\n".encode()
    )
    assert event.recipient == recipient


@pytest.mark.parametrize(
    ("action", "type_"),
    [
        ("Action: failed", BOUNCE),
        ("Action: Failed (no such user)", BOUNCE),
        ("Action: error", BOUNCE),
        ("Action: delayed", DEFERRED),
        ("Action: delivered", DELIVERED),
        ("Action: relayed", DELIVERED),
        ("Action: expanded", DELIVERED),
        ("Status: 5.1.1", BOUNCE),
        ("Status: 4.2.1", DEFERRED),
        ("Status: 2.0.0", DELIVERED),
    ],
)
def test_the_action_decides_on_the_event_and_the_status_where_there_is_none(action: str, type_: EventType) -> None:
    [event] = read(f"Content-Type: message/delivery-status\n\nFinal-Recipient: rfc822;{ADA}\n{action}\n".encode())
    assert event.type is type_


@pytest.mark.parametrize(
    ("date", "occurred"),
    [
        ("Mon, 2 Mar 2026 08:15:05 -0000", T),
        ("2 Mar 2026 09:15:05 +0100", T),
        ("Mon, 2 Mar 2036 08:15:05 +0000", "2026-03-05T12:00:00"),
        ("yesterday", "2026-03-05T12:00:00"),
        ("Mon, 99 Mar 2026 08:15:05 +0000", "2026-03-05T12:00:00"),
        ("Mon, 1 Jan 0001 00:00:00 +1400", "2026-03-05T12:00:00"),
    ],
)
def test_a_date_that_cannot_be_is_replaced_by_the_time_of_arrival(date: str, occurred: str) -> None:
    block = f"Reporting-MTA: dns; a\n\nFinal-Recipient: rfc822;{ADA}\nAction: failed\nLast-Attempt-Date: {date}\n"
    [event] = read(f"Content-Type: message/delivery-status\n\n{block}".encode())
    assert event.occurred_at == at(occurred)


@pytest.mark.parametrize(
    ("address", "attempt"),
    [
        (RETURN_PATH, ATTEMPT),
        (RETURN_PATH.upper(), ATTEMPT),
        ("bounce+x@bounces.example.com", None),
        (f"bounce+{ATTEMPT}", None),
        (f"bounce+{ATTEMPT}@a@b", None),
        ("bounce@bounces.example.com", None),
        ("", None),
    ],
)
def test_only_a_return_path_of_ours_names_an_attempt(address: str, attempt: str | None) -> None:
    assert verp_attempt(address) == attempt


def test_an_envelope_is_read_as_it_was_written() -> None:
    envelope = Envelope(RETURN_PATH, "2001:db8::25", datetime(2026, 3, 2, 8, 15, 5, 123456, tzinfo=UTC))
    assert unpack(pack(envelope, b"a\nb\r\n\x00\xff")) == (envelope, b"a\nb\r\n\x00\xff")


def nested(levels: int, filling: bytes) -> bytes:
    """A multipart in a multipart in a multipart."""
    opened = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(levels))
    return opened + filling


SIZE = 1 << 20
BOMBS = {
    "nesting": nested(20_000, b"x"),
    "nesting in one boundary": b"Content-Type: multipart/mixed; boundary=b\n\n--b\n" * 20_000,
    "nested, with many lines": nested(8, b"--b0\n" * (SIZE // 5)),
    "messages in messages": b"Content-Type: message/rfc822\n\n" * 30_000,
    "parts": b"Content-Type: multipart/report; boundary=b\n\n" + b"--b\n\n" * (SIZE // 5),
    "blank lines": b"\n" * SIZE,
    "fields": b"a: b\n" * (SIZE // 5),
    "other fields": b"".join(b"%x: b\n" % n for n in range(SIZE // 8)),
    "one field": b'Content-Type: multipart/report; boundary="' + b';\\"' * (SIZE // 3),
    "folded": b"Content-Type:" + b"\n " * (SIZE // 2),
    "recipients": b"Content-Type: message/delivery-status\n\na: b\n"
    + b"\nFinal-Recipient: rfc822;a@b.c\nAction: failed\n" * 20_000,
    "complaints": b"Content-Type: message/feedback-report\n\nFeedback-Type: abuse\n"
    + b"".join(b"Original-Rcpt-To: %d@b.c\n" % n for n in range(30_000)),
    "blanks in a report": b"Content-Type: message/delivery-status\n\na: b\n" + b" \n" * (SIZE // 2) + b"x",
    "failed recipients": b"X-Failed-Recipients: " + b"a@b.c," * 300 + b"\n\n" + b"a@b.c\n    x\n" * (SIZE // 14),
    "qmail": b"\nHi. This is the\n\n" + b"<a@b.c>:\nx\n\n" * (SIZE // 12),
    "words": b"X-Failed-Recipients: a@b.c\n\na@b.c\n " + b"user unknown unknown user has been " * (SIZE // 35),
    "numbers": b"X-Failed-Recipients: a@b.c\n\na@b.c\n " + b"5.1." * (SIZE // 4),
    "base64": b"Content-Type: message/delivery-status\nContent-Transfer-Encoding: base64\n\n" + b"Cgo=" * (SIZE // 4),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("to", [RETURN_PATH, FEEDBACK])
def test_a_mail_that_is_made_to_be_slow_is_read_within_a_second(name: str, to: str) -> None:
    started = time.process_time()
    with contextlib.suppress(ValueError):
        assert len(read(BOMBS[name], to)) <= 1000
    assert time.process_time() - started < 1


def test_what_is_too_big_is_not_read() -> None:
    with pytest.raises(ValueError, match="more than"):
        read(b"x" * (2 << 20))


@settings(max_examples=300, deadline=timedelta(seconds=5))
@given(st.binary(max_size=2000))
@example(b"[" * 1999)
@example(b"a b 0001-01-01T00:00:00+14:00\n")
def test_any_bytes_are_a_list_of_events_or_a_value_error(body: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(normalise(body), list)


PIECES = sorted({line for path in FIXTURES.glob("*.eml") for line in path.read_bytes().splitlines(keepends=True)})


@settings(max_examples=300, deadline=timedelta(seconds=5))
@given(
    st.lists(
        st.one_of(st.sampled_from(PIECES), st.sampled_from([b"\n", b"--", b"\xff", b":", b";"]), st.binary(max_size=8)),
        max_size=60,
    ),
    st.sampled_from([RETURN_PATH, FEEDBACK]),
)
def test_pieces_of_reports_in_any_order_are_a_list_of_events_or_a_value_error(pieces: list[bytes], to: str) -> None:
    try:
        events = read(b"".join(pieces), to)
    except ValueError:
        return
    for event in events:
        assert event.attempt == ATTEMPT
        assert event.occurred_at <= RECEIVED
        assert event.response is None or (len(event.response) <= 500 and event.response.isprintable())


@settings(max_examples=200, deadline=timedelta(seconds=5))
@given(st.sampled_from(sorted(REPORTS)), st.integers(0, 4000), st.integers(0, 40), st.binary(max_size=6))
def test_a_damaged_report_is_a_list_of_events_or_a_value_error(name: str, place: int, length: int, put: bytes) -> None:
    content = mail(name)
    with contextlib.suppress(ValueError):
        read(content[:place] + put + content[place + length :])
