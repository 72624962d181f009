"""Where Redis is, for redis-py: TLS verifies the peer's certificate and its name."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from .settings import Settings


def options(settings: Settings) -> dict[str, Any]:
    """What any client of redis-py is made with. Reads are not bounded here: a subscriber waits for as long as it takes."""
    url = settings.redis_url
    return {
        "host": url.host,
        "port": url.port,
        "db": url.database,
        "username": url.username,
        "password": url.password,
        "ssl": url.tls,
        "ssl_ca_certs": url.ca_file,
        "ssl_check_hostname": url.tls,
        "socket_connect_timeout": settings.redis_socket_connect_timeout.total_seconds(),
        "max_connections": settings.redis_pool_size,
    }


def connect(settings: Settings) -> Redis:
    """A client for doorbell and health check; it connects on first use and fails quickly."""
    return Redis(**options(settings), socket_timeout=settings.redis_socket_timeout.total_seconds())
