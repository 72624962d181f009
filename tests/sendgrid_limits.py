"""What SendGrid's `POST /v3/mail/send` refuses, and in which words (its public reference: mail-send errors, limitations)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

Json = dict[str, Any]

MAX_BODY_BYTES = 30 << 20
MAX_PERSONALIZATIONS = 1000
MAX_RECIPIENTS = 1000
MAX_CUSTOM_ARGS_BYTES = 10_000
RESERVED = {
    *("x-sg-id", "x-sg-eid", "received", "dkim-signature", "content-type", "content-transfer-encoding"),
    *("to", "from", "subject", "reply-to", "cc", "bcc"),
}

_KINDS = ("to", "cc", "bcc")
_ADDRESS = re.compile(r"[\x21-\x7e]+@[A-Za-z0-9.-]+\.[A-Za-z0-9-]+")
_HELP = "http://sendgrid.com/docs/API_Reference/Web_API_v3/Mail/errors.html#message."


def error(message: str, field: str | None = None) -> Json:
    """One entry of an error body's `errors`."""
    about = re.sub(r"\.\d+", "", field) if field else None
    return {"message": message, "field": field, "help": None if about is None else _HELP + about}


def check(payload: object, invalid: Collection[str] = (), *, vague: bool = False) -> list[Json]:
    """Everything that is wrong with a request, as a body with status 400 lists it.

    `invalid` are addresses that are refused besides; with `vague` no field says whose address it is.
    """
    if not isinstance(payload, dict):
        return [error("Bad Request")]
    errors = [*_senders(payload), *_content(payload.get("content")), *_headers(payload.get("headers", {}), "headers")]
    people: list[Json] = payload.get("personalizations") or []
    if not people:
        errors.append(error("You must have at least one personalization.", "personalizations"))
    elif len(people) > MAX_PERSONALIZATIONS:
        words = f"limited to 1000 personalizations per API request. You have provided {len(people)} personalizations."
        advice = "Please consider splitting this into multiple requests and resending your request."
        errors.append(error(f"The personalization block is {words} {advice}", "personalizations"))
    elif sum(len(each.get(kind, ())) for each in people for kind in _KINDS) > MAX_RECIPIENTS:
        words = "There is a limit of 1000 total recipients (to + cc + bcc) per request."
        errors.append(error(words, "personalizations"))
    else:
        for number, each in enumerate(people):
            errors += _personalization(each, payload, f"personalizations.{number}", invalid, vague=vague)
    return errors


def _senders(payload: Json) -> Iterable[Json]:
    if "from" not in payload:
        yield error("The from object must be provided for every email send.", "from")
    for name in ("from", "reply_to"):
        if name in payload and not _is_address(payload[name]):
            yield error(f"The {name} email does not contain a valid address.", f"{name}.email")
    if "reply_to" in payload and "reply_to_list" in payload:
        yield error("The reply_to parameter is mutually exclusive with reply_to_list.", "reply_to")


def _content(content: object) -> Iterable[Json]:
    if not isinstance(content, list) or not content:
        yield error("The content param is required unless you are using a transactional template.", "content")
        return
    for number, each in enumerate(content):
        if not isinstance(each.get("value"), str) or not each["value"]:
            words = "The content value must be a string at least one character in length."
            yield error(words, f"content.{number}.value")
    if "text/plain" in [each.get("type") for each in content][1:]:
        words = "Following RFC 1341, section 7.2, if either text/html or text/plain are to be sent in your email:"
        yield error(
            f"{words} text/plain needs to be first, followed by text/html, followed by any other content.", "content"
        )


def _personalization(each: Json, payload: Json, at: str, invalid: Collection[str], *, vague: bool) -> Iterable[Json]:
    yield from _recipients(each, at, invalid, vague=vague)
    yield from _headers(each.get("headers", {}), f"{at}.headers")
    yield from _custom_args(each.get("custom_args"), payload.get("custom_args", {}), f"{at}.custom_args")
    subject = each.get("subject", payload.get("subject"))
    if subject is None:
        words = "The subject is required. You can get around this requirement if you use a template with a subject"
        yield error(f"{words} defined or if every personalization has a subject defined.", "subject")
    elif not isinstance(subject, str) or not subject:
        yield error("The subject of your email must be a string at least one character in length.", f"{at}.subject")


def _recipients(each: Json, at: str, invalid: Collection[str], *, vague: bool) -> Iterable[Json]:
    if not each.get("to"):
        yield error("The to parameter is required for all personalization objects.", f"{at}.to")
    seen: set[str] = set()
    for kind in _KINDS:
        for number, recipient in enumerate(each.get(kind, ())):
            if not _is_address(recipient) or recipient["email"] in invalid:
                yield error("Does not contain a valid address.", None if vague else f"{at}.{kind}.{number}.email")
            elif recipient["email"].lower() in seen:
                words = "Each unique email address in the personalizations array should only be included once."
                yield error(f"{words} You have included {recipient['email']} more than once.", "personalizations")
            else:
                seen.add(recipient["email"].lower())


def _headers(headers: object, at: str) -> Iterable[Json]:
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        yield error("All values of the headers object must be strings.", at)
        return
    if len({name.lower() for name in headers}) < len(headers):
        yield error("The headers cannot contain duplicate keys.", at)
    for name, value in headers.items():
        if name.lower() in RESERVED:
            yield error("Header cannot be one of the reserved keys.", f"{at}.{name}")
        if not name.isascii() or " " in name:
            yield error("Header keys cannot contain non-ASCII characters or empty spaces.", f"{at}.{name}")
        if not value.isascii() or not value.replace("\t", " ").isprintable():
            yield error("Header values with Unicode characters must be encoded.", f"{at}.{name}")


def _custom_args(given: object, common: Json, at: str) -> Iterable[Json]:
    if given is None:
        return
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        yield error("All values of custom arguments object must be strings", at)
    elif not given:
        yield error("custom_args cannot be empty.", at)
    elif len(json.dumps({**common, **given}).encode()) > MAX_CUSTOM_ARGS_BYTES:
        words = "The combined size of both global and personalization custom arguments may not exceed 10,000 bytes"
        yield error(f"{words} per personalization.", at)


def _is_address(given: object) -> bool:
    if not isinstance(given, dict) or not isinstance(given.get("email"), str):
        return False
    return len(given["email"]) <= 320 and _ADDRESS.fullmatch(given["email"]) is not None
