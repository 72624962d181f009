"""Bounces and complaints that come by mail, as events.

Read are delivery status notifications (RFC 3464; RFC 6533 for addresses beyond ASCII) and feedback reports (RFC 5965, RFC
6591); among bounces without such a part those of qmail (QSBMF) and those that name their recipients in
`X-Failed-Recipients` (Exim, Google). Other detectors (flufl.bounce has 17) find addresses of servers long gone, and never a
status or a reply to judge by. So a bounce in any other form is a ValueError: its receipt stays where an operator sees it.

Anyone can send to these addresses. What counts is therefore the attempt, whose 62 random bits only those know who got the
message; a forger among them can report on recipients of that same message, and on nobody else.

The parser of the standard library takes MIME apart by recursion, without a bound. Here every part is cut out by its
boundary in linear time, as deep and as many as a report can need.
"""

from __future__ import annotations

import base64
import hashlib
import quopri
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from neoforge_email.inbound import Event
from neoforge_email.inbound.values import detail, line
from neoforge_email.lifecycle import EventType
from neoforge_email.message import parse_attempt

PROVIDER = "mail"

# A stored body in bytes; multiparts in multiparts; parts in all; fields of a header and bytes of one; recipients; bytes of
# text that words are looked for in; how old what is reported may be.
MAX_BYTES = 2 << 20
MAX_DEPTH = 8
MAX_PARTS = 100
MAX_FIELDS = 1000
MAX_VALUE = 2000
MAX_RECIPIENTS = 1000
MAX_TEXT = 1 << 16
MAX_AGE = timedelta(days=30)

_VERP = re.compile(r"bounce\+([0-9a-z-]+)@[^@]*", re.IGNORECASE)

# Feedback-Type to event. Any other (not-spam, auth-failure, virus, other) says nothing about what the recipient wants.
_FEEDBACK = {
    "abuse": EventType.SPAM_REPORT,
    "fraud": EventType.SPAM_REPORT,
    "opt-out": EventType.UNSUBSCRIBE,
    "opt-out-list": EventType.UNSUBSCRIBE,
}
_ACTIONS = {
    "failed": EventType.BOUNCE,
    "fail": EventType.BOUNCE,
    "error": EventType.BOUNCE,  # OpenSMTPD
    "delayed": EventType.DEFERRED,
    "delivered": EventType.DELIVERED,
    "relayed": EventType.DELIVERED,
    "expanded": EventType.DELIVERED,
}
_CLASSES = {"5": EventType.BOUNCE, "4": EventType.DEFERRED, "2": EventType.DELIVERED}

# Which failures suppress an address: those whose code (RFC 3463, RFC 7505) says that there is no such mailbox or that it is
# shut. A full mailbox (5.2.2), a message too big (5.2.3, 5.3.4), content, policy or spam (5.6, 5.7), protocol and routing
# do not, nor does the sender's own address (5.1.7, 5.1.8).
_DEAD = frozenset({"5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"})
# Codes that leave it open, in which servers say in words what these know. Exim reports nearly everything as 5.0.0.
_UNTOLD = re.compile(r"|5\.0\.\d+|5\.1\.0|5\.2\.0|5\.4\.[14]|5\.5\.0")
_DEAD_IN_WORDS = re.compile(
    r"(?:unknown|invalid|no such|nonexistent|non-existent) (?:local )?(?:user|recipient|mailbox|account|address|domain)"
    r"|(?:user|recipient|mailbox|account|address|domain|domain name|to reach) (?:is |was |has been )?"
    r"(?:unknown|not found|disabled|deactivated|does not exist|doesn't exist|no longer exists)"
    r"|user doesn't have an? \S{1,80} account|no mailbox here by that name|unroute?able address"
    r"|mx records point to non-existent hosts|recipnotfound|recipient address rejected: access denied"
    r"|5\.5\.0 requested action not taken: mailbox unavailable",
    re.IGNORECASE,
)
_NOT_THE_RECIPIENT = re.compile(r"\bsender\b|\bmail from\b|\bhelo\b", re.IGNORECASE)
_TOO_MUCH_MAIL = "ReceivingRate"  # Google gives 5.2.1 to a mailbox that gets too much at the moment, too

_ENHANCED = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?!\.?\d)")
_REPLY = re.compile(r"(?<![\d.])[45]\d\d[ -].*", re.DOTALL)
_WORD = re.compile(r"[a-z-]+")
_BOUNDARY = re.compile(r"""[;\s]boundary\s*=\s*(?:"([^"]+)"|([^\s;"]+))""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the listener knows beside the message: RCPT TO, the client's IP address, and when the message was there."""

    recipient: str
    peer: str
    at: datetime


def pack(envelope: Envelope, content: bytes) -> bytes:
    """The body of a receipt: a line with recipient, peer and time (ISO 8601), then the message as it came."""
    return f"{envelope.recipient} {envelope.peer} {envelope.at.isoformat()}\n".encode() + content


def unpack(body: bytes) -> tuple[Envelope, bytes]:
    """The inverse of `pack`; raises ValueError."""
    if len(body) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    first, _, content = body.partition(b"\n")
    recipient, peer, at = first.decode("ascii").split(" ")
    when = datetime.fromisoformat(at)
    if when.utcoffset() != timedelta():
        raise ValueError("the envelope's time is not UTC")
    return Envelope(recipient, peer, when), content


def event_id(recipient: str, content: bytes) -> str:
    """The same for a message that its sender delivers again because our answer was lost.

    Relays on its way may write other `Received` and signature fields each time, so of the header only what the author wrote
    counts, and the body.
    """
    head, body = _split(content)
    authored = re.findall(rb"(?im)^(?:message-id|date|subject):.*", head)
    return hashlib.sha256(b"\n".join([recipient.lower().encode(), *authored, b"", body])).hexdigest()


def verp_attempt(address: str) -> str | None:
    """The attempt that the return path `bounce+<attempt>@…` stands for."""
    match = _VERP.fullmatch(address)
    return _attempt(match[1]) if match else None


def _attempt(text: str) -> str | None:
    return text.lower() if parse_attempt(text) else None


def normalise(body: bytes) -> list[Event]:
    """The events that a stored mail reports, one a recipient; none for the answer of a person or of a machine on leave.

    Raises ValueError for a mail that reports what cannot be read, or on no message of ours.
    """
    envelope, content = unpack(body)
    mail = _Mail.read(content)
    to_attempt = verp_attempt(envelope.recipient)
    facts = _facts(mail)
    if facts is None:
        if to_attempt is None:
            raise ValueError("a letter, not a report")
        return []
    attempt = to_attempt or mail.attempt
    if facts and attempt is None:
        raise ValueError("the report names no message of ours")
    receipt = event_id(envelope.recipient, content)
    return [
        Event(
            provider=PROVIDER,
            event_id=f"{receipt}.{number}",
            type=fact.type,
            occurred_at=_when(envelope.at, fact.at, mail.fields.get("date"), fact.arrived),
            recipient=fact.recipient,
            attempt=attempt,
            permanent=fact.permanent,
            response=line(fact.response) or None,
            detail=detail(fact.detail),
        )
        for number, fact in enumerate(facts, 1)
    ]


def _when(received: datetime, *texts: str | None) -> datetime:
    """The first that is a date (RFC 5322) and can be true of what was received then."""
    for text in texts:
        with suppress(ValueError, OverflowError):
            found = parsedate_to_datetime((text or "")[:100])
            found = (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
            if received - MAX_AGE <= found <= received:
                return found
    return received


@dataclass(frozen=True, slots=True)
class _Fact:
    """What a report says of one recipient; `at` and `arrived` are dates as they stand there."""

    type: EventType
    recipient: str | None
    response: str = ""
    permanent: bool = False
    at: str | None = None
    arrived: str | None = None
    detail: Mapping[str, str | None] = field(default_factory=dict)


def _facts(mail: _Mail) -> list[_Fact] | None:
    """None for a mail that is no report; raises ValueError for one that says nothing that is understood."""
    if feedback := mail.find("message/feedback-report"):
        return list(_feedback(feedback, mail))
    subject = mail.fields.get("subject", "")
    if subject.startswith("complaint about message from"):  # Microsoft's until 2026: the message, with one field more
        return [_Fact(EventType.SPAM_REPORT, _address(mail.original.get("x-hmxmroriginalrecipient", "")), subject)]
    facts: list[_Fact] = []
    if status := mail.find("message/delivery-status", "message/global-delivery-status"):
        facts = list(_delivery_status(status))
    facts = facts or list(_named_in_header(mail)) or list(_qsbmf(mail))
    if len(facts) > MAX_RECIPIENTS:
        raise ValueError(f"a report on more than {MAX_RECIPIENTS} recipients")
    if not facts and mail.bounce:
        raise ValueError("a bounce in a form that is not read here")
    return facts or None


def _feedback(part: _Part, mail: _Mail) -> Iterator[_Fact]:
    """RFC 5965; a report may name several recipients, or none where the reporter hides them."""
    report = _fields(part.body)
    kind = _word(report.get("feedback-type", ""))
    if not kind:
        raise ValueError("a feedback report without Feedback-Type")
    event = _FEEDBACK.get(kind)
    if event is None:
        return
    named = re.findall(rb"(?im)^original-rcpt-to:(.*)", part.body)[:MAX_RECIPIENTS]
    recipients = {_address(text.decode("utf-8", "replace")) for text in named} or {None}
    for recipient in sorted(recipients, key=str):
        yield _Fact(
            event,
            recipient,
            response=f"feedback report: {kind}",
            arrived=report.get("arrival-date") or report.get("received-date"),
            detail={"feedback_type": kind, "user_agent": report.get("user-agent"), "source": mail.fields.get("from")},
        )


def _delivery_status(part: _Part) -> Iterator[_Fact]:
    """RFC 3464: a block of fields on the message, then one a recipient."""
    message: Mapping[str, str] = {}
    for block in re.split(rb"\n\s*\n", part.body.strip(), maxsplit=MAX_RECIPIENTS + 1):
        fields = _fields(block)
        named = fields.get("original-recipient") or fields.get("final-recipient")
        if named is None:
            message = message or fields
            continue
        status = _first(_ENHANCED, fields.get("status", ""))
        event = _ACTIONS.get(_word(fields.get("action", ""))) or _CLASSES.get(status[:1])
        if event is None:
            continue
        diagnostic = _untyped(fields.get("diagnostic-code", ""))
        yield _Fact(
            event,
            _recipient(fields),
            response=diagnostic or fields.get("status", ""),
            permanent=event is EventType.BOUNCE and _dead(status, diagnostic),
            at=fields.get("last-attempt-date"),
            arrived=message.get("arrival-date") or fields.get("arrival-date"),
            detail={
                "status": status,
                "reporting_mta": _untyped(message.get("reporting-mta", "") or fields.get("reporting-mta", "")),
                "remote_mta": _untyped(fields.get("remote-mta", "")),
                "retries_until": fields.get("will-retry-until"),
            },
        )


def _named_in_header(mail: _Mail) -> Iterator[_Fact]:
    """`X-Failed-Recipients`; the text has a line for each address, and deeper indented what was said about it."""
    for named in mail.fields.get("x-failed-recipients", "").split(","):
        if recipient := _address(named):
            said = re.search(rf"(?m)^( *){re.escape(recipient)}:?\n((?:\1 +\S.*\n?)+)", mail.text)
            yield _failed(recipient, said[2] if said else "")


def _qsbmf(mail: _Mail) -> Iterator[_Fact]:
    """qmail's own format (https://cr.yp.to/proto/qsbmf.txt): paragraphs, up to one that begins with a dash."""
    if not mail.text.startswith("Hi. This is the"):
        return
    for paragraph in re.split(r"\n\s*\n", mail.text, maxsplit=MAX_RECIPIENTS + 1)[1:]:
        if paragraph.startswith("-"):
            return
        first, _, said = paragraph.partition("\n")
        if first.startswith("<") and first.endswith(">:"):
            yield _failed(_address(first[:-1]), said)


def _failed(recipient: str | None, said: str) -> _Fact:
    """A failure that is told in words, the server's reply among them where there was one."""
    said = " ".join(said.split())
    response = _first(_REPLY, said) or said
    status = _first(_ENHANCED, response)
    return _Fact(EventType.BOUNCE, recipient, response, _dead(status, said), detail={"status": status})


def _dead(status: str, said: str) -> bool:
    """Whether a failure is one of the address itself, so that no mail should go there any more."""
    told = _first(_ENHANCED, said)
    if told and (not status or status[2] == "0"):
        status = told
    if status in _DEAD:
        return _TOO_MUCH_MAIL not in said
    if not _UNTOLD.fullmatch(status) or _first(_REPLY, said).startswith("4"):
        return False
    return bool(_DEAD_IN_WORDS.search(said)) and not _NOT_THE_RECIPIENT.search(said)


def _recipient(fields: Mapping[str, str]) -> str | None:
    """The address that the message was sent to: the original one, where its server tells it."""
    final = _address(fields.get("final-recipient", ""))
    original = _address(fields.get("original-recipient", ""))
    if original and original != final:  # some servers leave it encoded as it came in ORCPT (xtext, RFC 3461)
        original = re.sub(r"\+(2B|3D)", lambda match: chr(int(match[1], 16)), original)
    return original or final


def _address(text: str) -> str | None:
    """`rfc822;ada@example.net`, `utf-8; …`, `<ada@example.net>` or bare; None where it is no address, or a masked one."""
    text = re.sub(r"^[A-Za-z0-9-]{1,20};", "", text.strip()).strip()
    if bracketed := re.search(r"<([^<>]*)>", text):
        text = bracketed[1]
    text = re.sub(r"\\x\{(?!D[89A-F])([0-9A-F]{2,5})\}", lambda match: chr(int(match[1], 16)), text)  # RFC 6533
    local, at, domain = text.partition(" ")[0].rpartition("@")
    if not at or not local or not domain or len(text) > 320 or local.lower() in {"redacted", "undisclosed"}:
        return None
    if not domain.isascii():
        with suppress(UnicodeError):
            domain = domain.encode("idna").decode()  # as the service writes domains
    return f"{local}@{domain}" if text.isprintable() else None


def _untyped(text: str) -> str:
    """`smtp; 550 …` and `dns; mx.example.net` without the type."""
    return re.sub(r"^[A-Za-z0-9-]{1,20};", "", text).strip()


def _word(text: str) -> str:
    return _first(_WORD, text.lower())


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[0] if match else ""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that is no multipart, its transfer encoding undone."""

    type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Mail:
    """A mail as a report needs it: the header, the parts, and the header of the message that came back with it."""

    fields: Mapping[str, str]
    parts: list[_Part]
    original: Mapping[str, str]

    @classmethod
    def read(cls, content: bytes) -> _Mail:
        parts = list(_parts(content))
        original: Mapping[str, str] = {}
        for part in parts:
            if part.type in {"message/rfc822", "message/global"}:
                original = _fields(_split(part.body.lstrip())[0])
                break
            if part.type in {"text/rfc822-headers", "message/global-headers", "text/rfc822-header"}:
                original = _fields(part.body.strip())
                break
        return cls(_fields(_split(content)[0]), parts, original)

    def find(self, *types: str) -> _Part | None:
        return next((part for part in self.parts if part.type in types), None)

    @property
    def attempt(self) -> str | None:
        """The attempt of the message that came back."""
        original = self.original
        attempt = _attempt(original.get("x-neoforge-attempt", ""))
        return attempt or verp_attempt(original.get("return-path", "").strip("<> "))

    @property
    def text(self) -> str:
        """What it says to people, with LF."""
        part = self.find("text/plain")
        return part.body[:MAX_TEXT].decode("utf-8", "replace").strip() + "\n" if part else ""

    @property
    def bounce(self) -> bool:
        """It calls itself a report, and not one of what a person did with the message (RFC 8098), or a system sent it."""
        sender = self.fields.get("from", "").lower()
        if self.fields.get("content-type", "").lower().startswith("multipart/report"):
            return self.find("message/disposition-notification") is None
        return re.search(r"\bmailer-daemon\b|\bpostmaster@|\bmail delivery (?:sub)?system\b", sender) is not None


def _parts(content: bytes) -> Iterator[_Part]:
    """The parts in their order. A message that came back is one part: what is in it is not the reporter's word."""
    waiting = [(content, 0)]
    for _ in range(MAX_PARTS):
        if not waiting:
            return
        text, depth = waiting.pop()
        head, body = _split(text)
        fields = _fields(head)
        content_type = fields.get("content-type", "text/plain")
        boundary = _BOUNDARY.search(content_type)
        if not content_type.lower().startswith("multipart/"):
            kind = content_type.partition(";")[0].strip().lower()
            yield _Part(kind, _decoded(body, fields.get("content-transfer-encoding", "")))
        elif boundary and depth < MAX_DEPTH:
            parts = _cut(body, (boundary[1] or boundary[2]).encode())
            waiting.extend((part, depth + 1) for part in reversed(parts))


def _cut(body: bytes, boundary: bytes) -> list[bytes]:
    """A multipart's parts (RFC 2046); one that was cut off has no closing delimiter."""
    delimiter = re.compile(rb"(?m)^--" + re.escape(boundary) + rb"(--)?[ \t]*$")
    parts: list[bytes] = []
    start: int | None = None
    for match in delimiter.finditer(body):
        if start is not None:
            parts.append(body[start : match.start()])
        start = None if match[1] else match.end() + 1
        if match[1] or len(parts) == MAX_PARTS:
            break
    return parts if start is None else [*parts, body[start:]]


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Header and body, with LF."""
    head, _, body = (b"\n" + content.replace(b"\r\n", b"\n")).partition(b"\n\n")
    return head[1:], body


def _decoded(body: bytes, encoding: str) -> bytes:
    match encoding.strip().lower():
        case "base64":
            body = base64.b64decode(body + b"==")
        case "quoted-printable":
            body = quopri.decodestring(body)
    return body.replace(b"\r\n", b"\n")


def _fields(block: bytes) -> dict[str, str]:
    """Header fields by their names in lower case, unfolded, the first of each name."""
    fields: dict[str, str] = {}
    for text in re.sub(rb"\n[ \t]+", b" ", block).split(b"\n", MAX_FIELDS)[:MAX_FIELDS]:
        name, colon, value = text.partition(b":")
        if colon:
            key = name.strip().lower().decode("ascii", "replace")
            fields.setdefault(key, value[:MAX_VALUE].decode("utf-8", "replace").strip())
    return fields
