"""Addresses and custom headers as clients write them, checked before anything is queued.

A ValueError from here says what to change in the request.
"""

from __future__ import annotations

import re

from email_validator import EmailNotValidError, validate_email

from neoforge_email.message import Mailbox

# Octets, RFC 5321 4.5.3.1: a path of 256 holds two angle brackets and the address.
MAX_LOCAL_PART = 64
MAX_ADDRESS = 254

MAX_NAME = 256
MAX_HEADER_NAME = 76
MAX_HEADER_VALUE = 4096
MAX_HEADER_WORD = 900  # a line of a message has 998 octets at most, RFC 5322 2.1.1, and is folded at spaces only

_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# A label with "--" in third place is an A-label or reserved (RFC 5890): for email-validator to decode and judge.
_PLAIN = re.compile(rf"{_ATEXT}(?:\.{_ATEXT})*@(?!(?:[^@]*\.)?[^.@]{{2}}--)(?:{_LABEL}\.)+[A-Za-z]{{2,63}}")
_NAMED = re.compile(r"(?P<name>.*)<(?P<address>[^<>]*)>", re.DOTALL)
_QUOTED = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"', re.DOTALL)
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FORBIDDEN_IN_VALUE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

# Written by the service itself, or by those who carry the message; a client's own would lie or be lost.
_RESERVED = frozenset(
    [
        "from",
        "to",
        "cc",
        "bcc",
        "sender",
        "reply-to",
        "subject",
        "date",
        "message-id",
        "mime-version",
        "dkim-signature",
        "received",
        "return-path",
    ]
)
_RESERVED_PREFIXES = ("content-", "arc-", "x-neoforge-")


def parse_mailbox(text: str) -> Mailbox:
    """`Name <local@domain>`, `"Name, quoted" <local@domain>` or `local@domain`, as one mailbox.

    The domain comes out in lower-case ASCII (IDNA); the local part stays as it is.
    """
    text = text.strip(" \t")
    if len(text) <= MAX_ADDRESS and _PLAIN.fullmatch(text):
        return Mailbox(_plain(text))
    if bad := _FORBIDDEN.search(text):
        raise ValueError(f"remove the control character U+{ord(bad[0]):04X}: an address is one line of text")
    if not text:
        raise ValueError("is empty: write local@domain or Name <local@domain>")
    named = _NAMED.fullmatch(text)
    if named is None:
        if "<" in text or ">" in text:
            raise ValueError("write Name <local@domain>, with the address last and in one pair of angle brackets")
        return Mailbox(_address(text))
    return Mailbox(_address(named["address"].strip(" \t")), _name(named["name"].strip(" \t")))


def _address(text: str) -> str:
    if len(text) <= MAX_ADDRESS and _PLAIN.fullmatch(text):
        return _plain(text)
    local, at, domain = text.rpartition("@")
    if not at or not local or not domain:
        raise ValueError("an address has the form local@domain")
    if "," in text or ";" in text:
        raise ValueError("give one address; write several as a list")
    if not local.isascii():
        raise ValueError(
            "use an address whose part before the @ is plain ASCII: no provider here carries others (SMTPUTF8)"
        )
    if len(local) > MAX_LOCAL_PART:
        raise ValueError(f"shorten the part before the @ to {MAX_LOCAL_PART} characters")
    if domain.startswith("["):
        raise ValueError("use a domain name after the @, not an IP address")
    try:
        # Whether mail can be delivered there is the provider's to say.
        found = validate_email(text, check_deliverability=False, allow_smtputf8=False, test_environment=True)
    except EmailNotValidError as error:
        raise ValueError(str(error)) from None
    address = f"{local}@{found.ascii_domain.lower()}"
    top = found.ascii_domain.rpartition(".")
    if not top[1] or top[2].isdigit():
        raise ValueError("use a full domain name after the @, such as example.com")
    if len(address) > MAX_ADDRESS:
        raise ValueError(f"shorten the address to {MAX_ADDRESS} characters")
    return address


def _plain(text: str) -> str:
    local, _, domain = text.rpartition("@")
    if len(local) > MAX_LOCAL_PART:
        raise ValueError(f"shorten the part before the @ to {MAX_LOCAL_PART} characters")
    return f"{local}@{domain.lower()}"


def _name(text: str) -> str:
    if quoted := _QUOTED.fullmatch(text):
        text = re.sub(r"\\(.)", r"\1", quoted["text"]).strip(" ")
    elif re.search(r'[,;<>"]', text):
        raise ValueError('put a name with , ; < > or " into double quotes, and write several addresses as a list')
    if len(text) > MAX_NAME:
        raise ValueError(f"shorten the name to {MAX_NAME} characters")
    return text


def check_header(name: str, value: str) -> None:
    """Refuse a custom header that would break the message, forge a part of it or add lines to it."""
    if not name or len(name) > MAX_HEADER_NAME or not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"a header's name has 1 to {MAX_HEADER_NAME} letters, digits and hyphens")
    lower = name.lower()
    if lower in _RESERVED or lower.startswith(_RESERVED_PREFIXES):
        raise ValueError(f"remove the header {name}: the service writes it itself")
    if bad := _FORBIDDEN_IN_VALUE.search(value):
        raise ValueError(f"remove the control character U+{ord(bad[0]):04X}: a header's value is one line of text")
    if len(value) > MAX_HEADER_VALUE:
        raise ValueError(f"shorten the header's value to {MAX_HEADER_VALUE} characters")
    if len(value) > MAX_HEADER_WORD and value.isascii() and max(map(len, value.split())) > MAX_HEADER_WORD:
        raise ValueError(f"a header's value needs a space at least every {MAX_HEADER_WORD} characters")
