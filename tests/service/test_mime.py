"""Messages as they are written, read back with the standard library's parser."""

from __future__ import annotations

import email
import email.policy
import re
from datetime import UTC, datetime
from email.header import decode_header, make_header
from email.message import EmailMessage, MIMEPart
from email.utils import getaddresses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoforge_email import mime
from neoforge_email.addresses import check_header, parse_mailbox
from neoforge_email.message import Mailbox, Message
from tests.support import a_message

CONTROLS = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029]))
LINES = st.text(st.characters(exclude_characters=CONTROLS, exclude_categories=["Cs"]), max_size=300)
WORDS = st.lists(LINES, max_size=12).map(" ".join)
BODIES = st.text(st.characters(exclude_categories=["Cs"]), max_size=2000) | st.lists(
    st.sampled_from(["", ".", "..", "From here", " ", "x" * 998, "x" * 997, "ä" * 400, "-- ", "--=_", "\t", "=\n"]),
    max_size=20,
).map("\n".join)
NAMES = LINES.filter(lambda name: name == name.strip() and len(name) <= 256)


def read(message: Message) -> EmailMessage:
    """As a strict reader takes it; what every message must keep is checked on the way."""
    content = mime.build(message)
    assert content.endswith(b"\r\n")
    assert not re.search(rb"[^\r]\n|\r[^\n]", content)
    assert all(len(line) <= 998 for line in content.split(b"\r\n"))
    assert content.isascii()
    assert b"\0" not in content
    parsed = email.message_from_bytes(content, policy=email.policy.SMTP)
    assert not [defect for part in parsed.walk() for defect in part.defects]
    return parsed


def text_of(part: MIMEPart | None) -> str:
    assert part is not None
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode()


def test_a_message_holds_what_it_was_given() -> None:
    message = a_message(
        sender=Mailbox("shop@example.com", "Shop, the"),
        reply_to=Mailbox("help@example.com"),
        to=[Mailbox("ada@example.net", "Ada"), "bob@example.net"],
        cc=["carl@example.net"],
        bcc=["dora@example.net"],
        headers={"X-Campaign": "spring"},
        html="<p>It has left.</p>",
        created_at=datetime(2026, 3, 1, 12, 30, 15, 250000, tzinfo=UTC),
        lease_no=3,
    )
    parsed = read(message)
    assert parsed["From"] == '"Shop, the" <shop@example.com>'
    assert parsed["Reply-To"] == "help@example.com"
    assert parsed["To"] == "Ada <ada@example.net>, bob@example.net"
    assert parsed["Cc"] == "carl@example.net"
    assert parsed["Subject"] == "Your order"
    assert parsed["Date"] == "Sun, 01 Mar 2026 12:30:15 +0000"
    assert parsed["Message-ID"] == f"<{message.id.hex}@example.com>"
    assert parsed["X-NeoForge-Attempt"] == f"{message.id.hex}-3"
    assert parsed["X-Campaign"] == "spring"
    assert parsed.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in parsed.iter_parts()] == ["text/plain", "text/html"]
    assert b"dora" not in mime.build(message)


def test_a_retry_shows_the_recipients_of_the_first_attempt() -> None:
    message = a_message(to=["ada@example.net", "bob@example.net"], closed=["ada@example.net"])
    assert read(message)["To"] == "ada@example.net, bob@example.net"


def test_a_message_to_hidden_recipients_alone_still_has_a_to() -> None:
    assert read(a_message(to=[], bcc=["ada@example.net"]))["To"] == "undisclosed-recipients:;"


@given(subject=WORDS)
def test_any_subject_comes_back_as_it_was(subject: str) -> None:
    assert unfolded(read(a_message(subject=subject))["Subject"]) == unfolded(subject)


@given(name=NAMES)
def test_any_name_comes_back_as_it_was(name: str) -> None:
    # By the older of the standard library's parsers: the newer one puts a space between encoded words that hold blanks.
    content = mime.build(a_message(sender=Mailbox("shop@example.com", name), to=[Mailbox("ada@example.net", name)] * 3))
    parsed = email.message_from_bytes(content)
    for header, expected in (("From", ["shop@example.com"]), ("To", ["ada@example.net"] * 3)):
        found = getaddresses([str(parsed[header])])
        assert [address for _, address in found] == expected
        for written, _ in found:
            assert unfolded(str(make_header(decode_header(written)))) == unfolded(name)


@given(value=WORDS)
def test_any_header_that_is_allowed_comes_back_as_it_was(value: str) -> None:
    try:
        check_header("X-Any", value)
    except ValueError:
        return
    if "=?" not in value:  # encoded words of the client's own stay as they are
        assert unfolded(read(a_message(headers={"X-Any": value}))["X-Any"]) == unfolded(value)


@given(text=BODIES, html=BODIES | st.none())
def test_any_text_comes_back_as_it_was(text: str, html: str | None) -> None:
    parsed = read(a_message(text=text, html=html))
    assert lines(text_of(parsed.get_body(("plain",)))) == lines(text)
    if html is not None:
        assert lines(text_of(parsed.get_body(("html",)))) == lines(html)


@given(text=st.text(max_size=60))
def test_whatever_an_address_is_parsed_to_is_written_as_one_address(text: str) -> None:
    try:
        mailbox = parse_mailbox(f"{text} <ada@example.net>")
    except ValueError:
        return
    [address] = read(a_message(to=[mailbox]))["To"].addresses
    assert address.addr_spec == "ada@example.net"


@pytest.mark.parametrize("field", ["subject", "name", "header"])
@pytest.mark.parametrize("bad", ["a\r\nBcc: eve@example.com", "a\nb", "a\rb", "a\0b"])
def test_a_line_break_in_a_header_is_never_written(field: str, bad: str) -> None:
    message = {
        "subject": a_message(subject=bad),
        "name": a_message(to=[Mailbox("ada@example.net", bad)]),
        "header": a_message(headers={"X-Any": bad}),
    }[field]
    with pytest.raises(ValueError, match="line break or NUL"):
        mime.build(message)


def test_the_encoding_follows_the_text() -> None:
    encodings = {
        "plain": "7bit",
        "mostly ASCII, one ä": "quoted-printable",
        "Привет": "base64",
        "x" * 2000: "quoted-printable",
    }
    for text, encoding in encodings.items():
        assert read(a_message(text=text))["Content-Transfer-Encoding"] == encoding


def unfolded(value: str) -> str:
    """Folding may change which blanks stand between words, never the words."""
    return " ".join(value.split())


def lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
