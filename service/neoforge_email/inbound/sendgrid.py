"""SendGrid's event webhook: an array of events, signed as a whole; each event is a receipt of its own.

Signed by ECDSA over the time stamp and the raw body (X-Twilio-Email-Event-Webhook-*). SendGrid repeats a request for up
to 24 hours until it is answered by a 2xx, so events come twice; `sg_event_id` tells an event again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from neoforge_email.errors import MalformedBody, SignatureRefused
from neoforge_email.inbound import Event
from neoforge_email.lifecycle import EventType

from .values import address, detail, line, read_object, unix_time

if TYPE_CHECKING:
    from sendgrid.helpers.eventwebhook import EventWebhook  # type: ignore[import-untyped]  # the package has no types

SIGNATURE = b"x-twilio-email-event-webhook-signature"
TIMESTAMP = b"x-twilio-email-event-webhook-timestamp"

MAX_AHEAD = timedelta(minutes=10)
"""How far the clocks of SendGrid and of this machine may differ."""

_SIGNATURE = re.compile(r"(?:[A-Za-z0-9+/]{4}){8,64}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_EVENT_ID = re.compile(r"[\x21-\x7e]{1,200}")

TYPES = {
    "processed": EventType.SENT,
    "delivered": EventType.DELIVERED,
    "deferred": EventType.DEFERRED,
    "dropped": EventType.DROPPED,
    "bounce": EventType.BOUNCE,
    "open": EventType.OPEN,
    "click": EventType.CLICK,
    "spamreport": EventType.SPAM_REPORT,
    "unsubscribe": EventType.UNSUBSCRIBE,
    "group_unsubscribe": EventType.UNSUBSCRIBE,
}
DETAIL = (
    "url",
    "useragent",
    "ip",
    "sg_machine_open",
    "bounce_classification",
    "type",
    "status",
    "attempt",
    "asm_group_id",
    "category",
)


def check_freshness(headers: Mapping[bytes, bytes], max_age: timedelta, now: datetime) -> None:
    """Refuse, before anything is read, what is not signed or was not signed lately. Raises SignatureRefused."""
    timestamp = headers.get(TIMESTAMP, b"").decode("latin-1")
    if not _SIGNATURE.fullmatch(headers.get(SIGNATURE, b"").decode("latin-1")) or not _TIMESTAMP.fullmatch(timestamp):
        raise SignatureRefused("The request has no signature of SendGrid's event webhook; switch on signing there.")
    if not -MAX_AHEAD <= timedelta(seconds=now.timestamp() - int(timestamp)) <= max_age:
        raise SignatureRefused(
            "The request was signed too long ago, or a clock is wrong; SENDGRID_WEBHOOK_MAX_AGE says how old it may be."
        )


def check_signature(headers: Mapping[bytes, bytes], body: bytes, key: str) -> None:
    """Refuse what was not signed by the holder of the key (base64 of its DER form). Raises SignatureRefused, MalformedBody."""
    signature, timestamp = headers[SIGNATURE].decode("latin-1"), headers[TIMESTAMP].decode("latin-1")
    try:
        payload = body.decode()  # sendgrid encodes it again: the same bytes
    except UnicodeDecodeError:
        raise MalformedBody("The body is not UTF-8.") from None
    if not _verifier(key).verify_signature(payload, signature, timestamp):
        raise SignatureRefused("The signature is not of this body and SENDGRID_WEBHOOK_SECRET.")


@functools.lru_cache(maxsize=4)
def _verifier(key: str) -> EventWebhook:
    from sendgrid.helpers.eventwebhook import EventWebhook  # 40 ms that only who uses SendGrid has to wait for

    return EventWebhook(key)


def split(body: bytes) -> list[tuple[str, bytes]]:
    """The events of a request, each with its id, as they came. Raises MalformedBody for what is no array of JSON.

    What is wrong with one of them is found out when it is normalised, so that the others are kept.
    """
    try:
        elements = [bytes(element) for element in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        elements = _split_patiently(body)
    return [(event_id(element), element) for element in elements]


def _split_patiently(body: bytes) -> list[bytes]:
    """The same for what is JSON by and large: half a surrogate in one recipient's user agent must not cost the others."""
    try:
        found = json.loads(body, strict=False)
        if isinstance(found, list):
            return [json.dumps(element).encode() for element in found]
    except (ValueError, RecursionError):
        pass
    raise MalformedBody("The body must be a JSON array of events.")


def event_id(element: bytes) -> str:
    """What tells an event again when it is sent once more: `sg_event_id`, or its digest where it has none."""
    try:
        found = read_object(element).get("sg_event_id")
    except ValueError:
        found = None
    if isinstance(found, str) and _EVENT_ID.fullmatch(found):
        return found
    return f"sha256:{hashlib.sha256(element).hexdigest()}"


def normalise(body: bytes) -> list[Event]:
    """One event of the webhook; none for kinds that say nothing about a message. Raises ValueError for what is no event."""
    found = read_object(body)
    kind = found.get("event")
    if not isinstance(kind, str):
        raise ValueError("no `event` says what happened")
    if kind not in TYPES:
        return []
    bounced = kind == "bounce"
    return [
        Event(
            provider="sendgrid",
            event_id=event_id(body),
            type=TYPES[kind],
            occurred_at=unix_time(found.get("timestamp")),
            recipient=address(found.get("email")),
            attempt=line(found.get("neoforge_attempt")),
            provider_message_id=_message_id(found.get("sg_message_id")),
            permanent=bounced and found.get("type") == "bounce",  # `blocked`: this time only
            response=_response(found),
            detail=detail({name: found.get(name) for name in DETAIL}),
        )
    ]


def _message_id(value: object) -> str | None:
    """The `X-Message-Id` of the call; SendGrid adds to it which of its machines had the message."""
    text = line(value)
    return text.partition(".")[0] or None if text else None


def _response(found: dict[str, Any]) -> str | None:
    text, status = line(found.get("reason")) or line(found.get("response")), line(found.get("status"), 20)
    if status and text and status not in text:
        return line(f"{status} {text}")
    return text or status
