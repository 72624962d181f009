"""A client's request for one message: its shape, and everything that is checked before it is queued."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from neoforge_email import providers
from neoforge_email.addresses import check_header, parse_mailbox
from neoforge_email.errors import FieldError, MalformedBody, ValidationFailed
from neoforge_email.message import Draft, Kind, Mailbox, Policy
from neoforge_email.settings import Settings

MAX_RECIPIENTS = 50
MAX_SUBJECT = 998  # characters; RFC 5322 2.1.1 bounds a line to as many octets
MAX_HEADERS = 50
MAX_TAGS = 10
MAX_METADATA_KEYS = 50
MAX_METADATA_BYTES = 10_000  # as JSON
MAX_METADATA_LEVELS = 32
MAX_IDEMPOTENCY_KEY = 255

_TAG = re.compile(r"[A-Za-z0-9_-]{1,256}")
_IDEMPOTENCY_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_LINE_BREAK = re.compile("[\x00\r\n]")

Addresses = str | list[str]
Priority = Literal["high", "normal", "low"]


def _about(description: str, example: Any, **schema: Any) -> msgspec.Meta:
    return msgspec.Meta(description=description, examples=[example], extra_json_schema=schema)


_ADDRESSES = (
    f"One address or a list; `Name <local@domain>` or `local@domain`. At most {MAX_RECIPIENTS} in all, none twice."
)


class EmailRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One message to one or more recipients."""

    to: Annotated[Addresses, _about(_ADDRESSES, ["Ada Lovelace <ada@example.com>"])] = []
    subject: Annotated[str, _about("One line of text.", "Your order has left", maxLength=MAX_SUBJECT)]
    sender: Annotated[
        str | None, _about("The visible sender. Default: the service's FROM_EMAIL.", "Shop <shop@example.com>")
    ] = msgspec.field(name="from", default=None)
    cc: Annotated[Addresses, _about(_ADDRESSES, "bob@example.com")] = []
    bcc: Annotated[Addresses, _about(_ADDRESSES, [])] = []
    reply_to: Annotated[str | None, _about("Where answers go. Default: REPLY_TO_EMAIL.", "help@example.com")] = None
    html: Annotated[str | None, _about("The body as HTML. `html`, `text` or both.", "<p>It is on its way.</p>")] = None
    text: Annotated[str | None, _about("The body as plain text.", "It is on its way.")] = None
    headers: Annotated[
        dict[str, str],
        _about(
            "Further headers. Those that the service writes are refused.",
            {"X-Order": "4711"},
            maxProperties=MAX_HEADERS,
        ),
    ] = {}
    tags: Annotated[
        list[str], _about("Labels for your reports: letters, digits, - and _.", ["order"], maxItems=MAX_TAGS)
    ] = []
    metadata: Annotated[
        dict[str, Any],
        _about(
            f"Your own JSON, at most {MAX_METADATA_BYTES} bytes; never sent.",
            {"order": 4711},
            maxProperties=MAX_METADATA_KEYS,
        ),
    ] = {}
    on_uncertain: Annotated[
        Policy,
        _about(
            "Where it stays unknown whether a provider took the message: `resend` it under the same Message-ID, or `hold` it"
            " until an operator decides.",
            "hold",
        ),
    ] = "resend"
    priority: Annotated[Priority, _about("Which queue lane the message waits in.", "high")] = "normal"


_decoder = msgspec.json.Decoder(EmailRequest)
_encode_canonical = msgspec.json.Encoder(order="deterministic").encode
_encode_json = msgspec.json.encode


def decode(body: bytes) -> EmailRequest:
    """Raises MalformedBody for what is no JSON, ValidationFailed for what has another shape."""
    try:
        try:
            return _decoder.decode(body)
        except msgspec.ValidationError as error:
            raise ValidationFailed("Some fields cannot be accepted.", errors=_explain(body, str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body must be one JSON object in UTF-8: {error}.") from None
    except RecursionError:
        raise MalformedBody("The body is nested too deeply.") from None


def _explain(body: bytes, message: str) -> list[FieldError]:
    """msgspec stops at the first fault and calls a dictionary's value `[...]`: look again, and name the fields."""
    found = msgspec.json.decode(body)
    if not isinstance(found, dict):
        return [{"field": "", "message": "the body must be a JSON object"}]
    known = {field.encode_name: field.required for field in msgspec.structs.fields(EmailRequest)}
    errors: list[FieldError] = [
        {"field": name, "message": "is not a field of this request; remove it or correct its spelling"}
        for name in found
        if name not in known
    ]
    errors += [
        {"field": name, "message": "is required"} for name, needed in known.items() if needed and name not in found
    ]
    text, _, path = message.partition(" - at `$")
    if not path:
        return errors
    field = path.strip(".`")
    if field == "headers[...]":
        headers: dict[str, Any] = found["headers"]
        wrong = [name for name, value in headers.items() if not isinstance(value, str)]
        return errors + [{"field": f"headers.{name}", "message": "must be a string"} for name in wrong]
    return [*errors, {"field": field.replace("[...]", ""), "message": text[:1].lower() + text[1:]}]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request may leave out, which lane a priority means, and what the provider cannot do."""

    sender: Mailbox | None
    reply_to: Mailbox | None
    lanes: Mapping[str, int]
    unsupported: Callable[[Draft], list[FieldError]]

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        return cls(
            sender=Mailbox(settings.from_email, settings.from_name) if settings.from_email else None,
            reply_to=Mailbox(settings.reply_to_email) if settings.reply_to_email else None,
            lanes=settings.lanes,
            unsupported=providers.unsupported(settings),
        )


def draft(request: EmailRequest, user_id: int, idempotency_key: bytes | None, rules: Rules) -> Draft:
    """The request, checked and ready for the intake; raises ValidationFailed with every fault found.

    The body's hash is taken over the decoded request with its keys sorted, so that a repeated request may be written
    differently (white space, order) and is still the same one.
    """
    errors: list[FieldError] = []
    recipients = _recipients(request, errors)
    sender = rules.sender
    if request.sender is not None:
        sender = _mailbox("from", request.sender, errors)
    elif sender is None:
        errors.append({"field": "from", "message": "is required, since the service has no default sender"})
    reply_to = rules.reply_to
    if request.reply_to is not None:
        reply_to = _mailbox("reply_to", request.reply_to, errors)
    _check_content(request, errors)
    _check_headers(request.headers, errors)
    _check_labels(request, errors)
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        message = f"must be 1 to {MAX_IDEMPOTENCY_KEY} visible ASCII characters without spaces"
        errors.append({"field": "Idempotency-Key", "message": message})
    if errors or sender is None:
        raise ValidationFailed("Some fields cannot be accepted.", errors=errors)
    checked = Draft(
        user_id=user_id,
        lane=rules.lanes[request.priority],
        sender=sender,
        reply_to=reply_to,
        subject=request.subject,
        headers=request.headers,
        tags=request.tags,
        metadata=request.metadata,
        html=request.html or None,
        text=request.text or None,
        recipients=recipients,
        idempotency_key=idempotency_key.decode() if idempotency_key else None,
        on_uncertain=request.on_uncertain,
        body_hash=hashlib.sha256(_encode_canonical(request)).digest() if idempotency_key else b"",
    )
    if errors := rules.unsupported(checked):
        raise ValidationFailed("The provider cannot do all that this message asks for.", errors=errors)
    return checked


def _mailbox(field: str, text: str, errors: list[FieldError]) -> Mailbox | None:
    try:
        return parse_mailbox(text)
    except ValueError as error:
        errors.append({"field": field, "message": str(error)})
        return None


def _recipients(request: EmailRequest, errors: list[FieldError]) -> list[tuple[Kind, Mailbox]]:
    recipients: list[tuple[Kind, Mailbox]] = []
    seen: dict[str, str] = {}
    count = 0
    for kind, value in ((Kind.TO, request.to), (Kind.CC, request.cc), (Kind.BCC, request.bcc)):
        if not value:
            continue
        texts = [value] if isinstance(value, str) else value
        count += len(texts)
        if count > MAX_RECIPIENTS:
            message = f"at most {MAX_RECIPIENTS} recipients a message, in to, cc and bcc together"
            errors.append({"field": kind.value, "message": message})
            break
        for position, text in enumerate(texts):
            field = kind.value if isinstance(value, str) else f"{kind.value}[{position}]"
            mailbox = _mailbox(field, text, errors)
            if mailbox is None:
                continue
            other = seen.setdefault(mailbox.address.lower(), field)
            if other is not field:
                errors.append({"field": field, "message": f"is the same address as {other}; give each address once"})
            recipients.append((kind, mailbox))
    if count == 0:
        errors.append({"field": "to", "message": "at least one recipient is needed, in to, cc or bcc"})
    return recipients


def _check_content(request: EmailRequest, errors: list[FieldError]) -> None:
    if len(request.subject) > MAX_SUBJECT:
        errors.append({"field": "subject", "message": f"must have at most {MAX_SUBJECT} characters"})
    if _LINE_BREAK.search(request.subject):
        errors.append({"field": "subject", "message": "must be one line: remove CR, LF and NUL"})
    if not request.html and not request.text:
        errors.append({"field": "text", "message": "a message needs html, text or both"})
    for field, content in (("html", request.html), ("text", request.text)):
        if content is not None and "\0" in content:
            errors.append({"field": field, "message": "must not contain NUL (U+0000)"})


def _check_headers(headers: Mapping[str, str], errors: list[FieldError]) -> None:
    if len(headers) > MAX_HEADERS:
        errors.append({"field": "headers", "message": f"at most {MAX_HEADERS} headers"})
        return
    seen: set[str] = set()
    for name, value in headers.items():
        try:
            check_header(name, value)
        except ValueError as error:
            errors.append({"field": f"headers.{name}", "message": str(error)})
        if name.lower() in seen:
            errors.append({"field": f"headers.{name}", "message": "stands twice, in another case"})
        seen.add(name.lower())


def _check_labels(request: EmailRequest, errors: list[FieldError]) -> None:
    if len(request.tags) > MAX_TAGS:
        errors.append({"field": "tags", "message": f"at most {MAX_TAGS} tags"})
    for position, tag in enumerate(request.tags[:MAX_TAGS]):
        if not _TAG.fullmatch(tag):
            message = "must be 1 to 256 letters, digits, hyphens and underscores"
            errors.append({"field": f"tags[{position}]", "message": message})
    if not request.metadata:
        return
    if len(request.metadata) > MAX_METADATA_KEYS:
        errors.append({"field": "metadata", "message": f"at most {MAX_METADATA_KEYS} keys"})
    if _deeper_than(MAX_METADATA_LEVELS, request.metadata):
        errors.append({"field": "metadata", "message": f"must be nested at most {MAX_METADATA_LEVELS} levels deep"})
        return
    encoded = _encode_json(request.metadata)
    if len(encoded) > MAX_METADATA_BYTES:
        errors.append({"field": "metadata", "message": f"must have at most {MAX_METADATA_BYTES} bytes as JSON"})
    elif b"\\u0000" in encoded and _holds_nul(request.metadata):
        errors.append({"field": "metadata", "message": "must not contain NUL (U+0000)"})


def _deeper_than(levels: int, value: object) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return items is not None and (levels == 0 or any(_deeper_than(levels - 1, item) for item in items))


def _holds_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    return isinstance(value, list) and any(_holds_nul(item) for item in value)
