"""Providers: who carries the mail away. `create` makes those that the settings name."""

from __future__ import annotations

from collections.abc import Callable

from neoforge_email.dkim import Signer
from neoforge_email.errors import FieldError, SettingsError
from neoforge_email.message import Draft
from neoforge_email.providers import ses
from neoforge_email.providers.base import Provider
from neoforge_email.providers.memory import MemoryProvider
from neoforge_email.providers.router import Router
from neoforge_email.providers.smtp import SmtpProvider
from neoforge_email.redis import connect
from neoforge_email.settings import Settings


def create(settings: Settings) -> Router:
    """EMAIL_PROVIDER and its fall-backs; SettingsError if their settings cannot be used. Connects to nothing yet."""
    signer = _signer(settings)
    try:
        providers = [_provider(name, settings, signer) for name in settings.email_providers]
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return Router.of(providers, settings, connect(settings))


def _provider(name: str, settings: Settings, signer: Signer | None) -> Provider:
    if name == "memory":
        return MemoryProvider(
            window=settings.email_worker_batch_size,
            connections=settings.smtp_connections,
            timeout=settings.smtp_timeout,
            signer=signer,
        )
    if name == "ses":
        return ses.SesProvider(
            region=settings.aws_region or "",  # never empty: the settings see to it
            access_key_id=settings.aws_access_key_id,
            secret_access_key=settings.aws_secret_access_key,
            endpoint_url=settings.ses_endpoint_url,
            configuration_set=settings.ses_configuration_set,
            timeout=settings.ses_timeout,
            connections=settings.ses_connections,
            reports=bool(settings.ses_topic_arns),
        )
    if name == "sendgrid":
        from neoforge_email.providers.sendgrid import SendGridProvider  # pulls in an HTTP client

        return SendGridProvider(
            settings.sendgrid_api_key or "",
            url=settings.sendgrid_url,
            timeout=settings.sendgrid_timeout,
            connections=settings.sendgrid_connections,
            reports=settings.sendgrid_webhook_secret is not None,
        )
    return SmtpProvider(
        settings.smtp_server,
        settings.smtp_port,
        username=settings.smtp_username,
        password=settings.smtp_password,
        use_tls=settings.smtp_use_tls,
        use_ssl=settings.smtp_use_ssl,
        ca_file=settings.smtp_ca_file,
        timeout=settings.smtp_timeout,
        connections=settings.smtp_connections,
        window=settings.email_worker_batch_size,
        bounce_domain=settings.bounce_domain,
        signer=signer,
    )


def unsupported(settings: Settings) -> Callable[[Draft], list[FieldError]]:
    """What one of the settings' providers cannot do for a message, by field of its request.

    A message must fit them all: at its acceptance nobody knows which of them will carry it.
    """
    checks = [check for name in settings.email_providers if (check := _unsupported(name)) is not None]
    return lambda draft: [error for check in checks for error in check(draft)]


def _unsupported(name: str) -> Callable[[Draft], list[FieldError]] | None:
    if name == "ses":
        return ses.unsupported
    if name == "sendgrid":
        from neoforge_email.providers import sendgrid

        return sendgrid.unsupported
    return None


def _signer(settings: Settings) -> Signer | None:
    if not (settings.dkim_domain and settings.dkim_selector and settings.dkim_private_key):
        return None
    try:
        return Signer(settings.dkim_domain, settings.dkim_selector, settings.dkim_private_key)
    except ValueError as error:
        raise SettingsError(f"DKIM_DOMAIN, DKIM_SELECTOR, DKIM_PRIVATE_KEY: {error}") from None
