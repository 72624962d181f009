"""The Redis client, made in one place: TLS verifies the peer's certificate and its name."""

from __future__ import annotations

from redis.asyncio import Redis

from .settings import Settings


def connect(settings: Settings) -> Redis:
    """A client for doorbell and health check; it connects on first use and fails quickly."""
    url = settings.redis_url
    return Redis(
        host=url.host,
        port=url.port,
        db=url.database,
        username=url.username,
        password=url.password,
        ssl=url.tls,
        socket_timeout=settings.redis_socket_timeout.total_seconds(),
        socket_connect_timeout=settings.redis_socket_connect_timeout.total_seconds(),
        max_connections=settings.redis_pool_size,
        ssl_ca_certs=url.ca_file,
        ssl_check_hostname=url.tls,
    )
