"""SendGrid's event webhook: what it says about mail that was taken, and how it signs it (its public reference, 2026)."""

from __future__ import annotations

import json
import secrets
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.sendgrid_limits import Json

SIGNATURE = "X-Twilio-Email-Event-Webhook-Signature"
TIMESTAMP = "X-Twilio-Email-Event-Webhook-Timestamp"


@dataclass(frozen=True, slots=True)
class Taken:
    """One personalization that was taken, with the message-level fields that apply to it."""

    at: float
    x_message_id: str
    sender: Json
    reply_to: Json | None
    content: list[Json]
    personalization: Json

    @property
    def headers(self) -> dict[str, str]:
        found: dict[str, str] = self.personalization.get("headers", {})
        return found

    @property
    def message_id(self) -> str | None:
        return self.headers.get("Message-ID")

    @property
    def custom_args(self) -> dict[str, str]:
        found: dict[str, str] = self.personalization.get("custom_args", {})
        return found

    @property
    def recipients(self) -> tuple[str, ...]:
        """Every address, to before cc before bcc."""
        return tuple(each["email"] for kind in ("to", "cc", "bcc") for each in self.personalization.get(kind, ()))


@dataclass
class EventWebhook:
    """Signs with a key of its own: ECDSA over P-256 and SHA-256, of the timestamp and the raw body."""

    _key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def verification_key(self) -> str:
        """As SendGrid shows it in its settings: base64 of the public key's DER form (SubjectPublicKeyInfo)."""
        public = self._key.public_key()
        return b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()

    def sign(self, timestamp: str, body: bytes) -> str:
        return b64encode(self._key.sign(timestamp.encode() + body, ec.ECDSA(SHA256()))).decode()

    def events(self, taken: Iterable[Taken], kinds: Sequence[str]) -> list[Json]:
        """For each recipient one event a kind, in that order; `blocked` is a bounce that is temporary."""
        return [
            event(each, kind, address, at=int(each.at) + number)
            for each in taken
            for address in each.recipients
            for number, kind in enumerate(kinds)
        ]

    async def post(self, url: str, events: Sequence[Json], *, timestamp: int | None = None) -> int:
        """Deliver one webhook, signed; the status of the answer, 0 where there was none."""
        body = b"[" + b",\r\n".join(json.dumps(each).encode() for each in events) + b"]\r\n"
        stamp = str(int(time.time()) if timestamp is None else timestamp)
        headers = {"Content-Type": "application/json", SIGNATURE: self.sign(stamp, body), TIMESTAMP: stamp}
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, data=body, headers=headers) as response,
            ):
                return response.status
        except (aiohttp.ClientError, TimeoutError):
            return 0


def event(taken: Taken, kind: str, address: str, *, at: int | None = None, **fields: Any) -> Json:
    """One event of the webhook; custom arguments stand at the top level, `fields` go over everything."""
    details: dict[str, Json] = {
        "deferred": {"response": "400 try again later", "attempt": "5"},
        "delivered": {"response": "250 OK", "tls": 1, "ip": "192.0.2.10"},
        "bounce": {
            "type": "bounce",
            "status": "5.1.1",
            "bounce_classification": "Invalid Address",
            "reason": "550 5.1.1 The email account that you tried to reach does not exist",
        },
        "blocked": {
            "event": "bounce",
            "type": "blocked",
            "status": "5.7.1",
            "bounce_classification": "Reputation",
            "reason": "550 5.7.1 blocked by our list",
        },
        "dropped": {"reason": "Bounced Address", "status": "5.0.0"},
        "open": {"useragent": "Mozilla/5.0", "ip": "198.51.100.7", "sg_machine_open": False},
        "click": {
            "useragent": "Mozilla/5.0",
            "ip": "198.51.100.7",
            "url": "https://shop.example.com/order",
            "url_offset": {"index": 0, "type": "html"},
        },
        "group_unsubscribe": {"asm_group_id": 10, "useragent": "Mozilla/5.0", "ip": "198.51.100.7"},
    }
    return {
        **taken.custom_args,
        "email": address,
        "timestamp": int(taken.at) if at is None else at,
        "smtp-id": taken.message_id,
        "event": kind,
        "sg_event_id": secrets.token_urlsafe(24),
        "sg_message_id": f"{taken.x_message_id}.filter0001.16648.5515E0B88.0",
        **details.get(kind, {}),
        **fields,
    }
