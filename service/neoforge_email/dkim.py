"""DKIM signatures (RFC 6376, RFC 8463) in relaxed/relaxed form."""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

# Signed once more than they occur, so that a second one added under way breaks the signature (RFC 6376 8.15). The first
# group also when absent: who adds one changes who seems to write, to whom, or about what.
_ALWAYS = ("from", "reply-to", "to", "cc", "subject")
_WHERE_PRESENT = (
    "date",
    "message-id",
    "mime-version",
    "content-type",
    "content-transfer-encoding",
    "list-unsubscribe",
    "list-unsubscribe-post",
)

_DOMAIN = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}")
_SELECTOR = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_SPACES = re.compile(rb"[ \t]+")
_FOLDS = re.compile(rb"\r\n(?=[ \t])")


class Signer:
    """Signs for `domain` with the private key whose public half stands in DNS at `selector`._domainkey.`domain`.

    `private_key` is PEM without a password: RSA of 2048 to 4096 bits, or Ed25519. ValueError says what is wrong with it.
    """

    def __init__(self, domain: str, selector: str, private_key: str, *, clock: Callable[[], float] = time.time) -> None:
        self.domain = domain.lower()
        self.selector = selector.lower()
        if not _DOMAIN.fullmatch(self.domain):
            raise ValueError("the DKIM domain is no domain name (ASCII, such as example.com)")
        if not _SELECTOR.fullmatch(self.selector):
            raise ValueError("the DKIM selector is no DNS label (letters, digits, hyphens, dots)")
        self._key = _load(private_key)
        self._algorithm = "rsa-sha256" if isinstance(self._key, RSAPrivateKey) else "ed25519-sha256"
        self._clock = clock

    def sign(self, message: bytes) -> bytes:
        """The message with its DKIM-Signature in front; CRLF line ends in and out."""
        head, separator, body = message.partition(b"\r\n\r\n")
        if not separator:
            head = message.removesuffix(b"\r\n")
        fields: dict[str, list[bytes]] = {}
        for field in _FOLDS.sub(b"", head).split(b"\r\n"):
            label, _, value = field.partition(b":")
            fields.setdefault(label.strip().lower().decode("ascii"), []).append(value)
        names: list[str] = []
        signed: list[bytes] = []
        for name in (*_ALWAYS, *_WHERE_PRESENT):
            values = fields.get(name, [])
            if values or name in _ALWAYS:
                names += [name] * (len(values) + 1)
                signed += [
                    _relaxed_field(name, value) for value in reversed(values)
                ]  # from the bottom up, RFC 6376 5.4.2
        body_hash = b64encode(sha256(relaxed_body(body)).digest()).decode()
        tags = (
            f" v=1; a={self._algorithm}; c=relaxed/relaxed; d={self.domain};\r\n s={self.selector}; t={int(self._clock())};\r\n"
            f" h={_folded(names)};\r\n bh={body_hash};\r\n b="
        )
        own = _relaxed_field("dkim-signature", _FOLDS.sub(b"", tags.encode())).removesuffix(b"\r\n")
        signature = b64encode(self._signature(b"".join((*signed, own)))).decode()
        lines = "\r\n  ".join(signature[i : i + 72] for i in range(0, len(signature), 72))
        return f"DKIM-Signature:{tags}{lines}\r\n".encode() + message

    def _signature(self, data: bytes) -> bytes:
        if isinstance(self._key, RSAPrivateKey):
            return self._key.sign(data, PKCS1v15(), SHA256())
        return self._key.sign(sha256(data).digest())  # RFC 8463 3: the hash is signed, with pure Ed25519


def relaxed_body(body: bytes) -> bytes:
    """RFC 6376 3.4.4: runs of blanks are one space, none at the ends of lines, no empty lines at the end of the body."""
    body = _SPACES.sub(b" ", body).replace(b" \r\n", b"\r\n").removesuffix(b" ").rstrip(b"\r\n")
    return body + b"\r\n" if body else b""


def _relaxed_field(name: str, unfolded: bytes) -> bytes:
    return name.encode() + b":" + _SPACES.sub(b" ", unfolded).strip(b" ") + b"\r\n"


def _folded(names: list[str]) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 68:
            lines.append("")
        lines[-1] += f"{name}:"
    return "\r\n  ".join(lines).removesuffix(":")


def _load(pem: str) -> RSAPrivateKey | Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem.strip().encode(), password=None)
    except TypeError:
        raise ValueError("the DKIM key is encrypted; give it without a password (openssl pkey)") from None
    except ValueError:
        raise ValueError("the DKIM key is no private key in PEM form (openssl genrsa 2048)") from None
    if isinstance(key, Ed25519PrivateKey):
        return key
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("the DKIM key must be RSA or Ed25519")
    if not 2048 <= key.key_size <= 4096:
        raise ValueError(f"the DKIM key has {key.key_size} bits; RSA keys here have 2048 to 4096 (RFC 8301)")
    return key
