"""Amazon SNS as a signer of messages, with a certificate of its own, and what its web server would answer."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

REGION = "eu-central-1"
TOPIC = f"arn:aws:sns:{REGION}:123456789012:ses-events"
HOST = f"sns.{REGION}.amazonaws.com"
CERTIFICATE = f"https://{HOST}/SimpleNotificationService-0123456789abcdef0123456789abcdef.pem"

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def a_certificate(key: Key, *, begins: timedelta = -timedelta(days=30), ends: timedelta = timedelta(days=300)) -> bytes:
    """Self-made, as PEM; its life is told from now."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    certificate = builder.not_valid_before(now + begins).not_valid_after(now + ends).sign(key, SHA256())
    return certificate.public_bytes(Encoding.PEM)


def string_to_sign(message: dict[str, Any]) -> bytes:
    """As Amazon's documentation lists it for each type of message."""
    if message["Type"] == "Notification":
        names = ["Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"]
    else:
        names = ["Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
    return "".join(f"{name}\n{message[name]}\n" for name in names if name in message).encode()


@dataclass
class Sns:
    """`fetched` are the addresses that were asked for; `answer` may answer otherwise."""

    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    fetched: list[str] = field(default_factory=list)
    answer: Callable[[str], bytes] | None = None

    def __post_init__(self) -> None:
        self.certificate = a_certificate(self.key)

    async def fetch(self, url: str) -> bytes:
        self.fetched.append(url)
        if self.answer is not None:
            return self.answer(url)
        return self.certificate if url.endswith(".pem") else b"<ConfirmSubscriptionResponse/>"

    def notification(self, content: object = "{}", **changes: Any) -> dict[str, Any]:
        """A signed notification; `changes` are made before it is signed, and None leaves a field out."""
        text = content if isinstance(content, str) else json.dumps(content)
        return self.signed({"Type": "Notification", "Message": text, **changes})

    def subscription(self, kind: str = "SubscriptionConfirmation", **changes: Any) -> dict[str, Any]:
        """A signed confirmation of a subscription, or of its end."""
        token = "2336412f37fb687f5d51e6e2425929f5"
        topic = changes.get("TopicArn", TOPIC)
        url = f"https://{HOST}/?Action=ConfirmSubscription&TopicArn={topic}&Token={token}"
        return self.signed({"Type": kind, "Message": "You …", "Token": token, "SubscribeURL": url, **changes})

    def signed(self, given: dict[str, Any], *, now: datetime | None = None) -> dict[str, Any]:
        fields = {
            "MessageId": str(uuid4()),
            "TopicArn": TOPIC,
            "Timestamp": f"{now or datetime.now(UTC):%Y-%m-%dT%H:%M:%S}.123Z",
            "SignatureVersion": "2",
            "SigningCertURL": CERTIFICATE,
            **given,
        }
        message = {name: value for name, value in fields.items() if value is not None}
        digest = SHA1() if message.get("SignatureVersion") == "1" else SHA256()
        message.setdefault("Signature", b64encode(self.key.sign(string_to_sign(message), PKCS1v15(), digest)).decode())
        return message


def headers(message: dict[str, Any]) -> dict[str, str]:
    """What SNS says beside a message."""
    return {
        "Content-Type": "text/plain; charset=UTF-8",
        "x-amz-sns-message-type": str(message.get("Type")),
        "x-amz-sns-message-id": str(message.get("MessageId")),
        "x-amz-sns-topic-arn": str(message.get("TopicArn")),
    }
