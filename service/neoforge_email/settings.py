"""Every setting of the service, read once from the environment and passed down.

The names are the deployment guide's; an attribute is its variable in lower case. A variable may instead be a file
of its name in lower case in `$CREDENTIALS_DIRECTORY` (a systemd credential), which keeps secrets out of the
environment; passwords may stand apart from the URLs (`DATABASE_PASSWORD`, `REDIS_PASSWORD`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import ssl
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from .errors import SettingsError


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("write true or false")
    return values[text.lower()]


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"write a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], timedelta]:
    def parse(text: str) -> timedelta:
        if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) or not low <= float(text) <= high:
            raise ValueError(f"write a number of seconds from {low:g} to {high:g}")
        return timedelta(seconds=float(text))

    return parse


def _hours(text: str) -> timedelta:
    return timedelta(hours=_whole(1, 720)(text))


def _factor(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) or not 1 <= float(text) <= 100:
        raise ValueError("write a number from 1 to 100")
    return float(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})\s*(B|KB|MB|GB)?", text, re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError("write a size such as 10MB")
    return int(match[1]) << {"B": 0, "KB": 10, "MB": 20, "GB": 30}[(match[2] or "B").upper()]


def _one_of(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError("write one of " + ", ".join(values))
        return text

    return parse


def _level(text: str) -> str:
    return _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(text.upper())


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


PROVIDERS = ("sendgrid", "smtp", "ses", "memory")


def _providers(text: str) -> tuple[str, ...]:
    names = _list(text)
    if any(name not in PROVIDERS for name in names) or len(set(names)) < len(names):
        raise ValueError("write each of " + ", ".join(PROVIDERS) + " once at most, by comma")
    return names


def _path(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", text):
        raise ValueError("write a path such as /api/v1")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise ValueError("write up to 63 letters, digits, dots, dashes and underscores")
    return text


def _word(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise ValueError("control characters are not allowed")
    return text


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise ValueError("no such file")
    return Path(text)


def _address(text: str) -> str:
    if not re.fullmatch(r"[^\s@<>,;:\"]+@[A-Za-z0-9.-]+", text) or not text.isascii():
        raise ValueError("write a bare address such as noreply@example.com")
    return text


def _networks(text: str) -> tuple[str, ...]:
    for network in _list(text):
        try:
            ip_network(network)
        except ValueError:
            raise ValueError(f"{network} is no network; write it as 10.20.0.0/16") from None
    return _list(text)


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("write a URL such as https://api.example.com")
    return text.rstrip("/")


P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
"""How the DER form of a public key on the curve P-256 begins; 64 bytes follow."""


def _verification_key(text: str) -> str:
    try:
        key = b64decode(text, validate=True)
    except ValueError:
        key = b""
    if not key.startswith(P256) or len(key) != len(P256) + 64:
        raise ValueError("write the verification key as SendGrid shows it, a line that begins with MFkwEwYHKoZIzj0")
    return text


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """Where PostgreSQL is, as asyncpg wants it. SQLAlchemy's and libpq's spellings are understood."""

    dsn: str = field(repr=False)
    host: str
    tls: ssl.SSLContext | bool = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, password: str | None = None) -> DatabaseUrl:
        """`postgresql+asyncpg://user:password@host:5432/database?sslmode=verify-full&sslrootcert=/file`.

        `host=/directory` names a socket directory. asyncpg takes no `sslmode` from SQLAlchemy, so it is turned into
        an SSL context here. Raises ValueError.
        """
        parts = urlsplit(text)
        if parts.scheme not in {"postgresql", "postgresql+asyncpg", "postgres"} or not parts.path.strip("/"):
            raise ValueError("write postgresql+asyncpg://user@host:5432/database?sslmode=verify-full")
        query = dict(parse_qsl(parts.query))
        unknown = set(query) - {"sslmode", "sslrootcert", "host"}
        if unknown:
            raise ValueError(f"unknown parameter {min(unknown)}; sslmode, sslrootcert and host are understood")
        secret = password or (unquote(parts.password) if parts.password else None)
        user = quote(unquote(parts.username or "")) + (f":{quote(secret, safe='')}" if secret else "")
        host = parts.netloc.rpartition("@")[2]
        directory = f"?host={quote(query['host'], safe='')}" if "host" in query else ""
        dsn = f"postgresql://{user}@{host}{parts.path}{directory}"
        return cls(dsn, query.get("host", parts.hostname or "localhost"), cls._context(query))

    @staticmethod
    def _context(query: Mapping[str, str]) -> ssl.SSLContext | bool:
        mode = _one_of("disable", "require", "verify-ca", "verify-full")(query.get("sslmode", "disable"))
        if mode == "disable":
            return False
        root = query.get("sslrootcert")
        if root is not None:
            _file(root)
        context = ssl.create_default_context(cafile=root)
        context.check_hostname = mode == "verify-full"
        if mode == "require" and root is None:
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """`redis://user:password@host:6379/0`, or `rediss://…?ssl_ca_certs=/file` for TLS with a verified peer."""

    host: str
    port: int
    database: int
    username: str | None
    password: str | None = field(repr=False)
    tls: bool
    ca_file: str | None

    @classmethod
    def parse(cls, text: str, password: str | None = None) -> RedisUrl:
        parts = urlsplit(text)
        if parts.scheme not in {"redis", "rediss"} or not parts.hostname or not re.fullmatch(r"/?|/\d+", parts.path):
            raise ValueError("write redis://:password@host:6379/0, or rediss:// for TLS")
        query = dict(parse_qsl(parts.query))
        unknown = set(query) - {"ssl_ca_certs"}
        if unknown:
            raise ValueError(f"unknown parameter {min(unknown)}; ssl_ca_certs is understood")
        ca_file = query.get("ssl_ca_certs")
        if ca_file is not None:
            _file(ca_file)
        secret = password or (unquote(parts.password) if parts.password else None)
        return cls(
            host=parts.hostname,
            port=parts.port or 6379,
            database=int(parts.path.strip("/") or 0),
            username=unquote(parts.username) if parts.username else None,
            password=secret,
            tls=parts.scheme == "rediss",
            ca_file=ca_file,
        )


def _setting(default: str | None, parse: Callable[[str], Any] = _word, *, secret: bool = False) -> Any:
    """A field of `Settings`: its default as it would stand in the environment (None: no value), and its parser."""
    return field(metadata={"default": default, "parse": parse}, repr=not secret)


PORT = _whole(1, 65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Immutable; built by `from_environment`. Sizes are bytes, durations are `timedelta`."""

    log_level: str = _setting("INFO", _level)
    log_format: str = _setting("json", _one_of("json", "console"))
    project_name: str = _setting("NeoForge Email System")
    api_v1_str: str = _setting("/api/v1", _path)

    database_url: DatabaseUrl = _setting(None, DatabaseUrl.parse)
    database_password: str | None = _setting(None, secret=True)
    database_read_url: DatabaseUrl = _setting(None, DatabaseUrl.parse)
    database_migrate_url: DatabaseUrl = _setting(None, DatabaseUrl.parse)
    database_migrate_password: str | None = _setting(None, secret=True)
    db_pool_size: int = _setting("20", _whole(1, 1000))
    db_max_overflow: int = _setting("30", _whole(0, 1000))
    db_pool_timeout: timedelta = _setting("30", _seconds(1, 600))
    db_pool_recycle: timedelta = _setting("3600", _seconds(1, 86400))

    redis_url: RedisUrl = _setting(None, RedisUrl.parse)
    redis_password: str | None = _setting(None, secret=True)
    redis_pool_size: int = _setting("20", _whole(1, 1000))
    redis_socket_timeout: timedelta = _setting("5", _seconds(0.1, 60))
    redis_socket_connect_timeout: timedelta = _setting("5", _seconds(0.1, 60))

    email_provider: str = _setting("smtp", _one_of(*PROVIDERS))
    email_provider_fallbacks: tuple[str, ...] = _setting("", _providers)
    provider_breaker_failures: int = _setting("5", _whole(1, 1000))
    provider_breaker_wait: timedelta = _setting("30", _seconds(0.1, 3600))
    smtp_server: str = _setting("127.0.0.1")
    smtp_port: int = _setting("587", PORT)
    smtp_username: str | None = _setting(None)
    smtp_password: str | None = _setting(None, secret=True)
    smtp_use_tls: bool = _setting("true", _boolean)
    smtp_use_ssl: bool = _setting("false", _boolean)
    smtp_timeout: timedelta = _setting("30", _seconds(0.1, 600))
    smtp_ca_file: Path | None = _setting(None, _file)
    smtp_connections: int = _setting("8", _whole(1, 1000))
    smtp_rate: int = _setting("0", _whole(0, 1_000_000))
    sendgrid_api_key: str | None = _setting(None, secret=True)
    sendgrid_url: str = _setting("https://api.sendgrid.com", _url)
    sendgrid_timeout: timedelta = _setting("30", _seconds(0.1, 600))
    sendgrid_connections: int = _setting("8", _whole(1, 1000))
    sendgrid_rate: int = _setting("0", _whole(0, 1_000_000))
    sendgrid_webhook_secret: str | None = _setting(None, _verification_key, secret=True)
    sendgrid_webhook_max_age: timedelta = _setting("86400", _seconds(1, 86400))
    aws_region: str | None = _setting(None, _name)
    aws_access_key_id: str | None = _setting(None, secret=True)
    aws_secret_access_key: str | None = _setting(None, secret=True)
    ses_endpoint_url: str | None = _setting(None, _url)
    ses_configuration_set: str | None = _setting(None, _name)
    ses_timeout: timedelta = _setting("30", _seconds(0.1, 600))
    ses_connections: int = _setting("8", _whole(1, 1000))
    ses_rate: int = _setting("0", _whole(0, 1_000_000))
    ses_topic_arns: tuple[str, ...] = _setting("", _list)
    bounce_domain: str | None = _setting(None, _name)
    bounce_host: str = _setting("127.0.0.1")
    bounce_port: int = _setting("2525", PORT)

    webhook_timeout: timedelta = _setting("30", _seconds(0.1, 300))
    webhook_max_retries: int = _setting("3", _whole(0, 20))
    webhook_allowed_networks: tuple[str, ...] = _setting("", _networks)
    webhook_allow_http: bool = _setting("false", _boolean)

    from_email: str | None = _setting(None, _address)
    from_name: str = _setting("")
    reply_to_email: str | None = _setting(None, _address)

    dkim_domain: str | None = _setting(None, _name)
    dkim_selector: str | None = _setting(None, _name)
    dkim_private_key: str | None = _setting(None, str, secret=True)

    email_worker_interval: timedelta = _setting("1.0", _seconds(0.05, 60))
    email_worker_error_interval: timedelta = _setting("5.0", _seconds(0.05, 600))
    email_worker_max_retries: int = _setting("3", _whole(0, 100))
    email_worker_batch_size: int = _setting("10", _whole(1, 1000))
    email_worker_timeout: timedelta = _setting("300", _seconds(1, 3600))
    email_queue_name: str = _setting("email_queue", _name)
    email_queue_priority_high: int = _setting("1", _whole(1, 3))
    email_queue_priority_normal: int = _setting("2", _whole(1, 3))
    email_queue_priority_low: int = _setting("3", _whole(1, 3))
    email_retry_delay: timedelta = _setting("60", _seconds(0.1, 86400))
    email_retry_max_delay: timedelta = _setting("3600", _seconds(0.1, 86400))
    email_retry_exponential_base: float = _setting("2", _factor)
    email_uncertain_wait: timedelta | None = _setting(None, _seconds(0, 86400))
    email_expire_hours: timedelta = _setting("24", _hours)
    worker_instance: int | None = _setting(None, _whole(1, 999))

    allowed_origins: tuple[str, ...] = _setting("", _list)
    allowed_methods: tuple[str, ...] = _setting("GET,POST,PUT,DELETE,OPTIONS", _list)
    allowed_headers: tuple[str, ...] = _setting("*", _list)

    enable_metrics: bool = _setting("true", _boolean)
    metrics_host: str = _setting("127.0.0.1")
    metrics_port: int = _setting("8001", PORT)
    health_check_timeout: timedelta = _setting("10", _seconds(0.1, 60))

    graceful_shutdown_timeout: timedelta = _setting("30", _seconds(1, 600))
    request_timeout: timedelta = _setting("30", _seconds(1, 600))
    keepalive_timeout: timedelta = _setting("5", _seconds(1, 600))
    worker_processes: int = _setting("4", _whole(1, 64))
    worker_connections: int = _setting("1000", _whole(1, 100000))
    max_file_size: int = _setting("10MB", _size)
    host: str = _setting("127.0.0.1")
    port: int = _setting("8000", PORT)
    ssl_certfile: Path | None = _setting(None, _file)
    ssl_keyfile: Path | None = _setting(None, _file)
    forwarded_allow_ips: str = _setting("127.0.0.1")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable; raises SettingsError with a line for each that cannot be used, all at once."""
        problems: list[str] = []
        texts = {item.name: _raw(item, environ) for item in dataclasses.fields(cls)}
        texts["database_read_url"] = texts["database_read_url"] or texts["database_url"]
        texts["database_migrate_url"] = texts["database_migrate_url"] or texts["database_url"]
        texts["database_migrate_password"] = texts["database_migrate_password"] or texts["database_password"]
        password_of = {
            "database_url": "database_password",
            "database_read_url": "database_password",
            "database_migrate_url": "database_migrate_password",
            "redis_url": "redis_password",
        }
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            text = texts[item.name]
            if text is None:
                values[item.name] = None
                if item.name in {"database_url", "redis_url"}:
                    problems.append(f"{item.name.upper()}: must be set")
                continue
            try:
                if item.name in password_of:
                    values[item.name] = item.metadata["parse"](text, texts[password_of[item.name]])
                else:
                    values[item.name] = item.metadata["parse"](text)
            except (ValueError, OSError) as error:
                if _raw(item, environ):  # else it stands for another variable, which is named already
                    problems.append(f"{item.name.upper()}: {error}")
        if not problems:
            problems = _contradictions(values)
        if problems:
            raise SettingsError("\n".join(dict.fromkeys(problems)))
        return cls(**values)

    @property
    def lanes(self) -> dict[str, int]:
        """The lane of each priority; the claim serves lower numbers first."""
        return {
            "high": self.email_queue_priority_high,
            "normal": self.email_queue_priority_normal,
            "low": self.email_queue_priority_low,
        }

    @property
    def email_providers(self) -> tuple[str, ...]:
        """The provider of EMAIL_PROVIDER and its fall-backs, in the order in which they are tried."""
        return (self.email_provider, *self.email_provider_fallbacks)

    @property
    def doorbell_channel(self) -> str:
        """The Redis channel on which the API says that messages were committed."""
        return f"{self.email_queue_name}:doorbell"

    @property
    def instance(self) -> str:
        """Who holds a lease. A numbered worker takes its leases up again after a restart, so it has a lasting name."""
        host = socket.gethostname()
        return f"{host}/{self.worker_instance}" if self.worker_instance else f"{host}/pid{os.getpid()}"


def _raw(item: dataclasses.Field[Any], environ: Mapping[str, str]) -> str | None:
    """The text of a setting: environment, else credential file, else default. An empty variable is unset."""
    text = environ.get(item.name.upper(), "").strip()
    if text:
        return text
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if directory and (file := Path(directory) / item.name).is_file():
        return file.read_text(encoding="utf-8").strip() or None
    default: str | None = item.metadata["default"]
    return default


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Settings that are fine alone and wrong together."""
    lanes = {values[f"email_queue_priority_{name}"] for name in ("high", "normal", "low")}
    dkim = [values[name] for name in ("dkim_domain", "dkim_selector", "dkim_private_key")]
    tls = (values["ssl_certfile"], values["ssl_keyfile"])
    providers = (values["email_provider"], *values["email_provider_fallbacks"])
    checks = {
        "EMAIL_PROVIDER_FALLBACKS: must not name EMAIL_PROVIDER again": len(set(providers)) < len(providers),
        "AWS_REGION: must be set for the provider ses": "ses" in providers and not values["aws_region"],
        "AWS_SECRET_ACCESS_KEY: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together": bool(
            values["aws_access_key_id"]
        )
        != bool(values["aws_secret_access_key"]),
        "EMAIL_QUEUE_PRIORITY_HIGH: the three priorities must differ": len(lanes) < len(("high", "normal", "low")),
        "SMTP_USE_SSL: choose SMTP_USE_TLS (STARTTLS) or SMTP_USE_SSL, not both": values["smtp_use_tls"]
        and values["smtp_use_ssl"],
        "SMTP_PASSWORD: must be set beside SMTP_USERNAME": bool(values["smtp_username"])
        != bool(values["smtp_password"]),
        "DKIM_PRIVATE_KEY: DKIM_DOMAIN, DKIM_SELECTOR and DKIM_PRIVATE_KEY go together": any(dkim) and not all(dkim),
        "SSL_KEYFILE: SSL_CERTFILE and SSL_KEYFILE go together": any(tls) and not all(tls),
        "EMAIL_RETRY_MAX_DELAY: must not be shorter than EMAIL_RETRY_DELAY": values["email_retry_max_delay"]
        < values["email_retry_delay"],
    }
    return [line for line, wrong in checks.items() if wrong]
