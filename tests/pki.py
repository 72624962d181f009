"""A CA of the tests, and servers with certificates that are in order, expired, or for another name."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Pki:
    """A CA's file, and servers' contexts with a certificate of it; `good_file` is what `good` has loaded."""

    ca_file: Path
    good_file: Path
    good: ssl.SSLContext
    for_another: ssl.SSLContext
    expired: ssl.SSLContext


def make(directory: Path) -> Pki:
    """Files in `directory`; valid for a day."""
    now = datetime.now(UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())

    def certificate(
        file: Path, key: ec.EllipticCurvePrivateKey, name: x509.GeneralName | None, days: int = 1
    ) -> ssl.SSLContext | None:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file.name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca.pem")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=9))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=name is None, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )
        if name is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        else:
            names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
            usage = dict.fromkeys([*names.split(), "encipher_only", "decipher_only"], False)
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        signed = builder.sign(ca_key, SHA256())
        file.write_bytes(
            signed.public_bytes(Encoding.PEM)
            + (b"" if name is None else key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        )
        if name is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file)
        return context

    def server(file: str, name: x509.GeneralName, days: int = 1) -> ssl.SSLContext:
        context = certificate(directory / file, ec.generate_private_key(ec.SECP256R1()), name, days)
        assert context is not None
        return context

    certificate(directory / "ca.pem", ca_key, None)
    here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return Pki(
        directory / "ca.pem",
        directory / "good.pem",
        server("good.pem", here),
        server("for_another.pem", x509.DNSName("mail.example.com")),
        server("expired.pem", here, days=-1),
    )
