"""Addresses and headers as clients write them."""

from __future__ import annotations

import re
from email.headerregistry import Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neoforge_email.addresses import check_header, parse_mailbox
from neoforge_email.message import Mailbox


@pytest.mark.parametrize(
    ("text", "mailbox"),
    [
        ("ada@example.com", Mailbox("ada@example.com")),
        ("  Ada.L+tag@EXAMPLE.Com\t", Mailbox("Ada.L+tag@example.com")),
        ("Ada Lovelace <ada@example.com>", Mailbox("ada@example.com", "Ada Lovelace")),
        ("<ada@example.com>", Mailbox("ada@example.com")),
        ('"Lovelace, Ada" <ada@example.com>', Mailbox("ada@example.com", "Lovelace, Ada")),
        (r'"Ada \"the first\"" <ada@example.com>', Mailbox("ada@example.com", 'Ada "the first"')),
        ("Ada Länge <ada@example.com>", Mailbox("ada@example.com", "Ada Länge")),
        ("ada@bücher.example", Mailbox("ada@xn--bcher-kva.example")),
        ("ada@XN--BCHER-KVA.example", Mailbox("ada@xn--bcher-kva.example")),
        ("o'brien!#$%&*=?^_`{|}~@example.com", Mailbox("o'brien!#$%&*=?^_`{|}~@example.com")),
        ("a@mail.test", Mailbox("a@mail.test")),
    ],
)
def test_an_address_is_understood(text: str, mailbox: Mailbox) -> None:
    assert parse_mailbox(text) == mailbox


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "is empty"),
        ("ada", "local@domain"),
        ("ada@", "local@domain"),
        ("@example.com", "local@domain"),
        ("ada@example", "should have a period"),
        ("ada@127.0.0.1", "not within a valid top-level domain|full domain name"),
        ("ada@[127.0.0.1]", "not an IP address"),
        ("ada@example..com", ""),
        (".ada@example.com", ""),
        ("ada.@example.com", ""),
        ("a b@example.com", ""),
        ("ada@-example.com", ""),
        ("ada@xn--a.example", ""),
        ("äda@example.com", "plain ASCII"),
        ("ada@example.com, bob@example.com", "one address"),
        ("Lovelace, Ada <ada@example.com>", "double quotes"),
        ("Ada <ada@example.com> Lovelace", "with the address last"),
        ("Ada <<ada@example.com>>", "pair of angle brackets|double quotes"),
        ("Ada\r\nBcc: eve@example.com <ada@example.com>", "control character U[+]000D"),
        ("ada@example.com\n", "control character U[+]000A"),
        ("Ada\0 <ada@example.com>", "control character U[+]0000"),
        ("Ada \ud800 <ada@example.com>", "control character U[+]D800"),
        ("a" * 65 + "@example.com", "64 characters"),
        ("a@" + ".".join(["b" * 60] * 5) + ".com", ""),
        ("N" * 257 + " <ada@example.com>", "256 characters"),
        ('"ada lovelace"@example.com', ""),
    ],
)
def test_what_is_no_address_is_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice or "."):
        parse_mailbox(text)


@given(st.text(max_size=80) | st.from_regex(r"[ -~]{0,20}<?[ -~]{0,20}@[a-zA-Z0-9.-]{0,30}>?", fullmatch=True))
def test_whatever_is_let_through_can_stand_in_a_command_and_in_a_header(text: str) -> None:
    try:
        mailbox = parse_mailbox(text)
    except ValueError:
        return
    assert re.fullmatch(r"[!-~]{1,64}@[a-z0-9.-]{3,253}", mailbox.address)
    assert not set(mailbox.address) & set('<>,;:"\\()[] ')
    assert not re.search("[\x00-\x1f\x7f]", mailbox.name)
    assert str(Address(addr_spec=mailbox.address)) == mailbox.address
    assert parse_mailbox(mailbox.address) == Mailbox(mailbox.address)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Campaign", "spring"),
        ("List-Unsubscribe", "<https://example.com/u?x=1>, <mailto:u@example.com>"),
        ("X-Text", "Grüße, tab\tand all"),
        ("X-Long", "word " * 700),
        ("X-Empty", ""),
    ],
)
def test_a_header_of_the_clients_own_is_allowed(name: str, value: str) -> None:
    check_header(name, value)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("", "x", "letters, digits"),
        ("X Y", "x", "letters, digits"),
        ("X-A:", "x", "letters, digits"),
        ("X-Ä", "x", "letters, digits"),
        ("X-A\r\nBcc", "x", "letters, digits"),
        ("A" * 77, "x", "letters, digits"),
        ("BCC", "eve@example.com", "writes it itself"),
        ("message-id", "<1@x>", "writes it itself"),
        ("Content-Type", "text/plain", "writes it itself"),
        ("X-NeoForge-Attempt", "1", "writes it itself"),
        ("DKIM-Signature", "v=1", "writes it itself"),
        ("X-A", "x\r\nBcc: eve@example.com", "U[+]000D"),
        ("X-A", "x\nBcc: eve@example.com", "U[+]000A"),
        ("X-A", "x\u2028y", "U[+]2028"),
        ("X-A", "x\0", "U[+]0000"),
        ("X-A", "x" * 4097, "4096 characters"),
        ("X-A", "x" * 901, "a space at least every 900"),
    ],
)
def test_a_header_that_would_forge_or_break_is_refused(name: str, value: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        check_header(name, value)
