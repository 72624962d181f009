"""What SES reports through SNS: the events of a configuration set, or the feedback of an identity, in one form.

https://docs.aws.amazon.com/ses/latest/dg/event-publishing-retrieving-sns-contents.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from neoforge_email.inbound import Event
from neoforge_email.lifecycle import EventType

from .values import address, child, children, detail, iso_time, line, read_object

MOST_RECIPIENTS = 1000
ATTEMPT_TAG = "neoforge_attempt"
ATTEMPT_HEADER = "x-neoforge-attempt"


@dataclass(frozen=True, slots=True)
class Fact:
    """What one recipient's part of a notification says; `recipient` None is the message's only one."""

    type: EventType
    occurred_at: datetime
    recipient: str | None = None
    permanent: bool = False
    response: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


def normalise(body: bytes) -> list[Event]:
    """One event a recipient; none for what says nothing about a message. Raises ValueError for what is no notification."""
    if body.startswith(b"Successfully validated SNS topic"):  # what SES says, in words, when a topic is chosen
        return []
    found = read_object(body)
    kind = found.get("eventType", found.get("notificationType"))
    if not isinstance(kind, str):
        raise ValueError("neither `eventType` nor `notificationType` says what happened")
    if kind not in FACTS:
        return []
    mail = child(found, "mail")
    attempt, message_id = _attempt(mail), line(mail.get("messageId"))
    if attempt is None and message_id is None:
        raise ValueError("`mail` names no message")
    digest = hashlib.sha256(body).hexdigest()[:40]
    return [
        Event(
            provider="ses",
            event_id=f"{digest}.{number}",
            type=fact.type,
            occurred_at=fact.occurred_at,
            recipient=fact.recipient,
            attempt=attempt,
            provider_message_id=message_id,
            permanent=fact.permanent,
            response=fact.response,
            detail=fact.detail,
        )
        for number, fact in enumerate(FACTS[kind](found, mail))
    ]


def _attempt(mail: dict[str, Any]) -> str | None:
    """Configuration sets send the tags of a message back; the feedback of an identity has its headers at most."""
    for value in children(child(mail, "tags"), ATTEMPT_TAG):
        return line(value)
    for header in children(mail, "headers"):
        if isinstance(header, dict) and str(header.get("name")).lower() == ATTEMPT_HEADER:
            return line(header.get("value"))
    return None


def _addressed(mail: dict[str, Any]) -> list[str | None]:
    """Everyone whom the message went to."""
    return [address(item) for item in children(mail, "destination")[:MOST_RECIPIENTS]] or [None]


def _named(items: Iterable[Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """The recipients that a notification names, with what it says about each."""
    return [(address(item.get("emailAddress")), item) for item in items if isinstance(item, dict)][:MOST_RECIPIENTS]


def _sent(_: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    at = iso_time(mail.get("timestamp"))
    return [Fact(EventType.SENT, at, recipient) for recipient in _addressed(mail)]


def _delivery(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    delivery = child(found, "delivery")
    recipients = [address(item) for item in children(delivery, "recipients")[:MOST_RECIPIENTS]] or _addressed(mail)
    at, response = iso_time(delivery.get("timestamp")), line(delivery.get("smtpResponse"))
    more = detail({"server": delivery.get("reportingMTA"), "milliseconds": delivery.get("processingTimeMillis")})
    return [Fact(EventType.DELIVERED, at, recipient, response=response, detail=more) for recipient in recipients]


def _bounce(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    """An address on the account's own suppression list was not tried: it is no news about the address.

    One on the list of all of SES (`Suppressed`) bounced for others lately, and counts as a hard bounce with SES, too.
    """
    bounce = child(found, "bounce")
    kind, subtype = bounce.get("bounceType"), bounce.get("bounceSubType")
    tried = subtype != "OnAccountSuppressionList"
    return [
        Fact(
            EventType.BOUNCE if tried else EventType.DROPPED,
            iso_time(bounce.get("timestamp")),
            recipient,
            permanent=tried and kind == "Permanent",
            response=_diagnosis(item) or line(f"{kind}: {subtype}"),
            detail=detail(
                {"type": kind, "subtype": subtype, "status": item.get("status"), "server": bounce.get("reportingMTA")}
            ),
        )
        for recipient, item in _named(children(bounce, "bouncedRecipients")) or [(to, {}) for to in _addressed(mail)]
    ]


def _complaint(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    """Someone took it for spam; but `not-spam` takes that back, and an address on the account's list was not tried."""
    complaint = child(found, "complaint")
    kind = complaint.get("complaintFeedbackType")
    if kind == "not-spam":
        return []
    tried = complaint.get("complaintSubType") != "OnAccountSuppressionList"
    more = detail({"type": kind, "subtype": complaint.get("complaintSubType"), "useragent": complaint.get("userAgent")})
    return [
        Fact(
            EventType.SPAM_REPORT if tried else EventType.DROPPED,
            iso_time(complaint.get("timestamp")),
            recipient,
            response=line(kind) if tried else "on the suppression list of the SES account",
            detail=more,
        )
        for recipient, _ in _named(children(complaint, "complainedRecipients")) or [(to, {}) for to in _addressed(mail)]
    ]


def _delay(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    delay = child(found, "deliveryDelay")
    return [
        Fact(
            EventType.DEFERRED,
            iso_time(delay.get("timestamp")),
            recipient,
            response=_diagnosis(item) or line(delay.get("delayType")),
            detail=detail({"type": delay.get("delayType"), "status": item.get("status")}),
        )
        for recipient, item in _named(children(delay, "delayedRecipients")) or [(to, {}) for to in _addressed(mail)]
    ]


def _dropped(name: str, reason: str) -> Callable[[dict[str, Any], dict[str, Any]], list[Fact]]:
    def facts(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
        response = line(child(found, name).get(reason))
        return [
            Fact(EventType.DROPPED, iso_time(mail.get("timestamp")), recipient, response=response)
            for recipient in _addressed(mail)
        ]

    return facts


def _engagement(name: str, kind: EventType) -> Callable[[dict[str, Any], dict[str, Any]], list[Fact]]:
    """SES does not say which of several recipients it was: then it is about the message."""

    def facts(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
        told, addressed = child(found, name), _addressed(mail)
        more = detail({"url": told.get("link"), "useragent": told.get("userAgent"), "ip": told.get("ipAddress")})
        recipient = addressed[0] if len(addressed) == 1 else None
        return [Fact(kind, iso_time(told.get("timestamp")), recipient, detail=more)]

    return facts


def _subscription(found: dict[str, Any], mail: dict[str, Any]) -> list[Fact]:
    """Preferences were changed; only who opted out of something has unsubscribed."""
    preferences = child(child(found, "subscription"), "newTopicPreferences")
    topics = [item for item in children(preferences, "topicSubscriptionStatus") if isinstance(item, dict)]
    out = [item.get("topicName") for item in topics if str(item.get("subscriptionStatus")).lower() == "optout"]
    if preferences.get("unsubscribeAll") is not True and not out:
        return []
    more = detail({"list": child(found, "subscription").get("contactList"), "topics": out})
    return [replace(fact, detail=more) for fact in _engagement("subscription", EventType.UNSUBSCRIBE)(found, mail)]


def _diagnosis(item: dict[str, Any]) -> str | None:
    return line(item.get("diagnosticCode"))


FACTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], list[Fact]]] = {
    "Send": _sent,
    "Delivery": _delivery,
    "Bounce": _bounce,
    "Complaint": _complaint,
    "DeliveryDelay": _delay,
    "Reject": _dropped("reject", "reason"),
    "Rendering Failure": _dropped("failure", "errorMessage"),
    "Open": _engagement("open", EventType.OPEN),
    "Click": _engagement("click", EventType.CLICK),
    "Subscription": _subscription,
}
