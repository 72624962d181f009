"""The environment, and what is said about it when it cannot be used."""

from __future__ import annotations

import dataclasses
import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from neoforge_email.errors import SettingsError
from neoforge_email.settings import Settings

ENVIRONMENT = {
    "DATABASE_URL": "postgresql+asyncpg://api:pw@db1:5432/neoforge_prod",
    "REDIS_URL": "redis://:pw@cache1:6379/0",
}


def read(**variables: str) -> Settings:
    return Settings.from_environment({**ENVIRONMENT, **variables})


def test_the_guides_defaults_apply() -> None:
    settings = read()
    assert settings.email_worker_interval == timedelta(seconds=1)
    assert settings.email_worker_max_retries == 3
    assert settings.max_file_size == 10 * 1024 * 1024
    assert settings.lanes == {"high": 1, "normal": 2, "low": 3}


def test_every_bad_value_is_named_at_once_with_what_to_write() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment(
            {"DATABASE_URL": "mysql://x", "EMAIL_WORKER_INTERVAL": "often", "LOG_LEVEL": "LOUD", "MAX_FILE_SIZE": "big"}
        )
    lines = caught.value.detail.splitlines()
    named = {line.split(":")[0] for line in lines}
    assert named == {"DATABASE_URL", "REDIS_URL", "EMAIL_WORKER_INTERVAL", "LOG_LEVEL", "MAX_FILE_SIZE"}
    assert all("write" in line or "must be set" in line for line in lines)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"EMAIL_QUEUE_PRIORITY_HIGH": "2"}, "EMAIL_QUEUE_PRIORITY_HIGH"),
        ({"SMTP_USE_TLS": "true", "SMTP_USE_SSL": "true"}, "SMTP_USE_SSL"),
        ({"SMTP_USERNAME": "me"}, "SMTP_PASSWORD"),
        ({"DKIM_DOMAIN": "example.com"}, "DKIM_PRIVATE_KEY"),
        ({"EMAIL_RETRY_DELAY": "7200"}, "EMAIL_RETRY_MAX_DELAY"),
        ({"DATABASE_URL": "postgresql://h/x?sslmode=sometimes"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://h/x?channel_binding=require"}, "DATABASE_URL"),
        ({"REDIS_URL": "memcached://h"}, "REDIS_URL"),
        ({"EMAIL_PROVIDER": "ses"}, "AWS_REGION"),
        ({"EMAIL_PROVIDER": "smtp", "EMAIL_PROVIDER_FALLBACKS": "ses"}, "AWS_REGION"),
        ({"EMAIL_PROVIDER": "smtp", "EMAIL_PROVIDER_FALLBACKS": "sendgrid,smtp"}, "EMAIL_PROVIDER_FALLBACKS"),
        ({"EMAIL_PROVIDER_FALLBACKS": "sendgrid,sendgrid"}, "EMAIL_PROVIDER_FALLBACKS"),
        ({"EMAIL_PROVIDER_FALLBACKS": "pigeons"}, "EMAIL_PROVIDER_FALLBACKS"),
        ({"PROVIDER_BREAKER_FAILURES": "0"}, "PROVIDER_BREAKER_FAILURES"),
        ({"PROVIDER_BREAKER_WAIT": "soon"}, "PROVIDER_BREAKER_WAIT"),
        ({"SMTP_RATE": "-1"}, "SMTP_RATE"),
        ({"SENDGRID_RATE": "fast"}, "SENDGRID_RATE"),
        ({"SES_RATE": "1.5"}, "SES_RATE"),
        ({"AWS_ACCESS_KEY_ID": "AKIA"}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(variables: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**variables)
    assert [line.split(":")[0] for line in caught.value.detail.splitlines()] == [named]


def test_no_message_and_no_representation_holds_a_secret() -> None:
    settings = read(DATABASE_PASSWORD="hunter2", SMTP_USERNAME="u", SMTP_PASSWORD="hunter2", REDIS_PASSWORD="hunter2")
    assert "hunter2" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        read(DATABASE_URL="postgresql://u:hunter2@h/x?sslmode=hunter")
    assert "hunter2" not in caught.value.detail


def test_a_credential_file_stands_in_for_a_variable(tmp_path: Path) -> None:
    (tmp_path / "database_password").write_text("from file\n")
    settings = read(CREDENTIALS_DIRECTORY=str(tmp_path), DATABASE_URL="postgresql://api@db1/neoforge_prod")
    assert settings.database_url.dsn == "postgresql://api:from%20file@db1/neoforge_prod"
    assert settings.database_migrate_url.dsn == settings.database_url.dsn


def test_sslmode_becomes_a_context_as_strict_as_asked() -> None:
    assert read().database_url.tls is False
    required = read(DATABASE_URL="postgresql+asyncpg://h/x?sslmode=require").database_url.tls
    verified = read(DATABASE_URL="postgresql+asyncpg://h/x?sslmode=verify-full").database_url.tls
    assert isinstance(required, ssl.SSLContext)
    assert isinstance(verified, ssl.SSLContext)
    assert (required.verify_mode, required.check_hostname) == (ssl.CERT_NONE, False)
    assert (verified.verify_mode, verified.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_without_a_replica_readers_need_no_pool_of_their_own() -> None:
    settings = read(DATABASE_URL="postgresql+asyncpg://db1/x?sslmode=verify-full")
    assert settings.database_read_url == settings.database_url
    assert read(DATABASE_READ_URL="postgresql://db2/x").database_read_url != read().database_url


def test_the_page_of_settings_names_every_variable_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    for item in dataclasses.fields(Settings):
        rows = [line for line in page.splitlines() if line.startswith(f"| `{item.name.upper()}`")]
        assert len(rows) == 1, item.name
        default = item.metadata["default"]
        shown = rows[0].split("|")[2].strip().strip("`")
        assert shown == (default or ""), item.name
