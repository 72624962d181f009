"""DKIM signatures, checked by dkimpy."""

from __future__ import annotations

import base64

import dkim as dkimpy  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from neoforge_email import mime
from neoforge_email.dkim import Signer, relaxed_body
from neoforge_email.message import Mailbox
from tests.support import a_message

PrivateKey = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
RSA = rsa.generate_private_key(65537, 2048)
ED25519 = ed25519.Ed25519PrivateKey.generate()


def pem(key: PrivateKey, password: bytes | None = None) -> str:
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection).decode()


def verifies(message: bytes, key: PrivateKey) -> bool:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        public, kind = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), b"ed25519"
    else:
        public, kind = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), b"rsa"
    record = b"v=DKIM1; k=" + kind + b"; p=" + base64.b64encode(public)

    def dns(name: bytes, timeout: float = 5) -> bytes | None:
        return record if name == b"s1._domainkey.example.com." else None

    return bool(dkimpy.verify(message, dnsfunc=dns))


@pytest.fixture(params=[RSA, ED25519], ids=["rsa", "ed25519"])
def key(request: pytest.FixtureRequest) -> PrivateKey:
    chosen: PrivateKey = request.param
    return chosen


def test_a_built_message_verifies(key: PrivateKey) -> None:
    message = a_message(
        sender=Mailbox("shop@example.com", "Grüße"),
        subject="Ein langer Betreff, " * 20,
        html="<p>ä</p>",
        headers={"List-Unsubscribe": "<https://example.com/u>", "X-Other": "not signed"},
        to=[Mailbox(f"r{n}@example.net", f"Recipient {n}") for n in range(20)],
    )
    signed = mime.build(message, Signer("Example.COM", "s1", pem(key)))
    assert signed.startswith(b"DKIM-Signature: v=1;")
    assert max(map(len, signed.split(b"\r\n"))) <= 998
    assert verifies(signed, key)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"It has left.", b"It has lefT."),
        (b"Subject: Your order", b"Subject: Your orders"),
        (b"To: ada@", b"To: eve@"),
        (b"From: Shop", b"From: Bank"),
        (b"Subject:", b"From: Bank <x@example.com>\r\nSubject:"),
        (b"Subject:", b"Reply-To: eve@example.org\r\nSubject:"),
        (b"Subject:", b"Cc: eve@example.org\r\nSubject:"),
        (b"Subject:", b"Subject: Another\r\nSubject:"),
        (b"Content-Type: text/plain", b"Content-Type: text/html"),
    ],
)
def test_a_message_that_was_changed_does_not_verify(key: PrivateKey, old: bytes, new: bytes) -> None:
    signed = mime.build(a_message(), Signer("example.com", "s1", pem(key)))
    assert signed.count(old) == 1
    assert not verifies(signed.replace(old, new), key)


HEAD = b"From: shop@example.com\r\nTo: ada@example.net\r\nSubject:  two  \t blanks \r\n\tfolded\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"text",
        b"text\r\n\r\n\r\n",
        b" \t \r\n",
        b"a \t b \r\n  c\t\r\n\r\n d",
        b"trailing \t",
        b".\r\n..\r\n",
    ],
)
def test_odd_bodies_verify(key: PrivateKey, body: bytes) -> None:
    signed = Signer("example.com", "s1", pem(key)).sign(HEAD + b"\r\n" + body)
    # What is sent ends with a line end, also where the body has none.
    assert verifies(signed if signed.endswith(b"\r\n") else signed + b"\r\n", key)


def test_a_message_without_a_body_verifies(key: PrivateKey) -> None:
    assert verifies(Signer("example.com", "s1", pem(key)).sign(HEAD), key)


@given(body=st.lists(st.sampled_from([b" ", b"\t", b"\r\n", b"a", b".", b"=20"]), max_size=40).map(b"".join))
def test_bodies_are_relaxed_as_dkimpy_relaxes_them(body: bytes) -> None:
    sent = body if body.endswith(b"\r\n") else body + b"\r\n"
    assert relaxed_body(body) == dkimpy.canonicalization.Relaxed.canonicalize_body(sent)


@pytest.mark.parametrize(
    ("domain", "selector", "private_key", "advice"),
    [
        ("example", "s1", pem(ED25519), "no domain name"),
        ("bücher.example", "s1", pem(ED25519), "no domain name"),
        ("example.com", "s 1", pem(ED25519), "no DNS label"),
        ("example.com", "s1", "nonsense", "no private key in PEM form"),
        ("example.com", "s1", "", "no private key in PEM form"),
        ("example.com", "s1", pem(ED25519, b"secret"), "encrypted"),
        ("example.com", "s1", pem(ec.generate_private_key(ec.SECP256R1())), "RSA or Ed25519"),
        ("example.com", "s1", pem(rsa.generate_private_key(65537, 1024)), "1024 bits"),
    ],
)
def test_what_cannot_sign_is_refused_with_advice(domain: str, selector: str, private_key: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Signer(domain, selector, private_key)


def test_the_time_of_the_signature_is_the_clocks() -> None:
    signed = Signer("example.com", "s1", pem(ED25519), clock=lambda: 1_790_000_000.9).sign(HEAD)
    assert b" t=1790000000;" in signed
