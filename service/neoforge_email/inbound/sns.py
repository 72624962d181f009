"""What Amazon SNS posts to an HTTPS endpoint, and the proof that it comes from there and from a topic of ours.

https://docs.aws.amazon.com/sns/latest/dg/sns-verify-signature-of-message.html

The signature proves only that SNS sent it, on behalf of anyone: so the topic has to be one of SES_TOPIC_ARNS, and nothing
is fetched before that and the addresses are checked. SNS repeats a message within an hour (the documented hard limit for
HTTPS), under its first MessageId and Timestamp, and only after a 5xx: what may get better is therefore never answered by 4xx.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from neoforge_email.errors import MalformedBody, SignatureRefused, Unavailable

MOST_BYTES = 1 << 20
"""Of a request. A message has at most 256 KiB, and JSON inside JSON grows."""
MAX_AGE = timedelta(hours=24)
"""Far more than SNS needs, and far less than receipts are remembered: a replay within it is recognised by its MessageId."""
MAX_AHEAD = timedelta(minutes=10)

FETCH_SECONDS = 5.0
FETCH_BYTES = 64 << 10
FETCHES = 4
"""At once. Whoever names a topic of ours can make us ask SNS for a certificate."""
CERTIFICATES = 16
CONFIRMED = 100

Fetch = Callable[[str], Awaitable[bytes]]
"""GET an HTTPS address without following redirects. Raises Refused for a 4xx or 3xx, OSError for what may get better."""

_TOPIC = re.compile(r"arn:(aws|aws-cn|aws-us-gov):sns:([a-z0-9-]{4,30}):[0-9]{12}:[A-Za-z0-9_-]{1,256}(?:\.fifo)?")
_MESSAGE_ID = re.compile(r"[A-Za-z0-9-]{1,100}")
_QUERY = re.compile(r"[!-~]{1,2000}")


class Refused(Exception):
    """The server answered that there is nothing of that name."""


class Envelope(msgspec.Struct, rename="pascal", kw_only=True):
    """The JSON that SNS posts; fields that it may add are ignored."""

    type: Literal["Notification", "SubscriptionConfirmation", "UnsubscribeConfirmation"]
    message_id: str
    topic_arn: str
    message: str
    timestamp: str
    signature_version: str
    signature: str
    signing_cert_url: str = msgspec.field(name="SigningCertURL")
    subject: str | None = None
    token: str | None = None
    subscribe_url: str | None = msgspec.field(name="SubscribeURL", default=None)


def read(body: bytes) -> Envelope:
    """Raises MalformedBody."""
    try:
        envelope = msgspec.json.decode(body, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(f"The body is not a message of Amazon SNS: {error}.") from None
    if not _MESSAGE_ID.fullmatch(envelope.message_id):
        raise MalformedBody("The body is not a message of Amazon SNS: MessageId is not a UUID.")
    return envelope


def check_origin(envelope: Envelope, headers: Mapping[bytes, bytes], topics: Collection[str], now: datetime) -> str:
    """Refuse everything that can be refused without the certificate; returns the host that all addresses have to name.

    Raises SignatureRefused.
    """
    topic = _TOPIC.fullmatch(envelope.topic_arn)
    if envelope.topic_arn not in topics or topic is None:
        raise SignatureRefused("This topic is not one of SES_TOPIC_ARNS.")
    for name, value in {
        b"x-amz-sns-message-type": envelope.type,
        b"x-amz-sns-message-id": envelope.message_id,
        b"x-amz-sns-topic-arn": envelope.topic_arn,
    }.items():
        if headers.get(name) != value.encode():
            raise SignatureRefused(f"The header {name.decode()} does not say what the body says.")
    if envelope.signature_version != "2":
        raise SignatureRefused("Set the attribute SignatureVersion of the topic to 2: SHA-1 proves nothing any more.")
    host = f"sns.{topic[2]}.amazonaws.com{'.cn' if topic[1] == 'aws-cn' else ''}"
    if not re.fullmatch(
        rf"https://{re.escape(host)}/SimpleNotificationService-[A-Za-z0-9]{{1,64}}\.pem", envelope.signing_cert_url
    ):
        raise SignatureRefused("SigningCertURL is not an address of Amazon SNS in the region of the topic.")
    try:
        at = datetime.strptime(envelope.timestamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        raise SignatureRefused("Timestamp is not in the form of Amazon SNS.") from None
    if not now - MAX_AGE <= at <= now + MAX_AHEAD:
        raise SignatureRefused("The message was published too long ago, or a clock is wrong.")
    return host


def signed_text(envelope: Envelope) -> bytes:
    """What SNS signs: names and values in the order of their names, a line each."""
    names = {
        "Message": envelope.message,
        "MessageId": envelope.message_id,
        "Subject": envelope.subject if envelope.type == "Notification" else None,
        "SubscribeURL": envelope.subscribe_url if envelope.type != "Notification" else None,
        "Timestamp": envelope.timestamp,
        "Token": envelope.token if envelope.type != "Notification" else None,
        "TopicArn": envelope.topic_arn,
        "Type": envelope.type,
    }
    return "".join(f"{name}\n{value}\n" for name, value in names.items() if value is not None).encode()


class Verifier:
    """Knows the certificates of SNS, as they are fetched."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._certificates: dict[str, x509.Certificate] = {}
        self._confirmed: dict[str, None] = {}
        self._fetching = asyncio.Semaphore(FETCHES)

    async def check(self, envelope: Envelope, now: datetime) -> None:
        """Refuse what SNS has not signed; `check_origin` comes first. Raises SignatureRefused, Unavailable."""
        certificate = self._known(envelope.signing_cert_url, now) or await self._learn(envelope.signing_cert_url, now)
        key = certificate.public_key()
        assert isinstance(key, RSAPublicKey)
        try:
            key.verify(b64decode(envelope.signature, validate=True), signed_text(envelope), PKCS1v15(), SHA256())
        except (InvalidSignature, ValueError):
            raise SignatureRefused("The signature is not of this message and the certificate of Amazon SNS.") from None

    def _known(self, url: str, now: datetime) -> x509.Certificate | None:
        certificate = self._certificates.get(url)
        return certificate if certificate is not None and now <= certificate.not_valid_after_utc else None

    async def _learn(self, url: str, now: datetime) -> x509.Certificate:
        """TLS has proved the host, whose name was checked. A chain is looked at where the file holds one."""
        content = await self._get(url)
        if (learnt := self._known(url, now)) is not None:  # another request was waiting for it as well
            return learnt
        try:
            first, *issuers = x509.load_pem_x509_certificates(content)
            for subject, issuer in zip([first, *issuers], issuers, strict=False):
                subject.verify_directly_issued_by(issuer)
            key = first.public_key()
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise SignatureRefused("SigningCertURL does not lead to a certificate.") from None
        if not first.not_valid_before_utc <= now <= first.not_valid_after_utc:
            raise SignatureRefused("The certificate under SigningCertURL is not valid now.")
        if not isinstance(key, RSAPublicKey) or key.key_size < 2048:
            raise SignatureRefused("The certificate under SigningCertURL has no RSA key of 2048 bits or more.")
        while len(self._certificates) >= CERTIFICATES:
            del self._certificates[next(iter(self._certificates))]
        self._certificates[url] = first
        return first

    async def confirm(self, envelope: Envelope, host: str) -> None:
        """Confirm a subscription that SNS has proved to be of our topic, once. Raises SignatureRefused, Unavailable."""
        url = envelope.subscribe_url or ""
        prefix = f"https://{host}/?"
        query = parse_qs(urlsplit(url).query) if url.startswith(prefix) and _QUERY.fullmatch(url) else {}
        wanted = {"Action": "ConfirmSubscription", "TopicArn": envelope.topic_arn, "Token": envelope.token}
        if any(query.get(name) != [value] for name, value in wanted.items()):
            raise SignatureRefused("SubscribeURL is not the address of Amazon SNS that confirms this topic.")
        if envelope.message_id in self._confirmed:
            return
        await self._get(url)
        while len(self._confirmed) >= CONFIRMED:
            del self._confirmed[next(iter(self._confirmed))]
        self._confirmed[envelope.message_id] = None

    async def _get(self, url: str) -> bytes:
        try:
            async with asyncio.timeout(2 * FETCH_SECONDS), self._fetching:
                return await self._fetch(url)
        except Refused:
            raise SignatureRefused("Amazon SNS knows nothing of an address in this message.") from None
        except OSError as error:
            raise Unavailable(f"Amazon SNS cannot be asked ({type(error).__name__}); send it again") from error


async def fetch(url: str) -> bytes:
    """The real `Fetch`: at most FETCH_BYTES within FETCH_SECONDS."""
    import aiohttp  # 0.2 s that only who uses SES has to wait for

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS)) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status // 100 in {3, 4} and answer.status != 429:
                raise Refused(answer.status)
            if answer.status != 200:
                raise ConnectionError(f"status {answer.status}")
            content = bytearray()
            async for part in answer.content.iter_any():
                content += part
                if len(content) > FETCH_BYTES:
                    raise Refused("more than a certificate")
            return bytes(content)
    except aiohttp.ClientError as error:
        raise ConnectionError(type(error).__name__) from error
