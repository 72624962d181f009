"""What a test of the service needs: its settings on servers of its own, and where its mail arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from neoforge_email.mailbox import Store, smtp_server
from neoforge_email.settings import Settings
from tests.pki import Pki
from tests.pki import make as make_pki
from tests.support import Database, Sink


@pytest.fixture
def environment(database: Database, redis_url: str) -> dict[str, str]:
    """The environment of an API on a fresh database; for processes of their own, and to change."""
    return {
        "DATABASE_URL": database.api,
        "DATABASE_MIGRATE_URL": database.migrator,
        "REDIS_URL": redis_url,
        "EMAIL_PROVIDER": "memory",
        "EMAIL_WORKER_INTERVAL": "0.1",
        "EMAIL_WORKER_ERROR_INTERVAL": "0.1",
        "PROVIDER_BREAKER_WAIT": "0.2",
        "FROM_EMAIL": "noreply@example.com",
        "ENABLE_METRICS": "false",
        "WORKER_PROCESSES": "1",
    }


@pytest.fixture
def make_settings(environment: dict[str, str], database: Database) -> Callable[..., Settings]:
    """`make_settings("worker", EMAIL_RETRY_DELAY="1")`: the settings of the role `api` or `worker`, with changes."""

    def make(role: str = "api", **variables: str) -> Settings:
        dsn = {"api": database.api, "worker": database.worker}[role]
        return Settings.from_environment({**environment, "DATABASE_URL": dsn, **variables})

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """The API's settings."""
    return make_settings("api")


@pytest.fixture
def worker_settings(make_settings: Callable[..., Settings]) -> Settings:
    """The worker's settings, on the same servers as `settings`."""
    return make_settings("worker")


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates for servers on the loopback interface."""
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """A real SMTP server on the loopback interface that keeps what it takes."""
    store = Store()
    async with smtp_server(store) as port:
        yield Sink(store, port)
