"""The API as a Litestar application."""

from __future__ import annotations

import gc
import os
from typing import Any, cast

import msgspec
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, RequestBody, Schema, SecurityScheme, Server

from . import __version__
from .api import documentation, emails, health, inbound, problems, webhook_endpoints
from .api.runtime import Slot
from .api.submission import EmailRequest
from .inbound import sns
from .observability import configure_logging
from .settings import Settings


def create_app(settings: Settings, *, fetch: sns.Fetch = sns.fetch) -> Litestar:
    """The application; it connects to nothing before its life begins. `fetch` gets what Amazon SNS's messages point at."""
    slot = Slot()
    path = f"{settings.api_v1_str}/emails"
    app = Litestar(
        route_handlers=[
            Router(
                settings.api_v1_str,
                route_handlers=[*emails.routes(slot), *webhook_endpoints.routes(slot)],
                security=[{"apiKey": []}],
            ),
            Router(settings.api_v1_str, route_handlers=[*inbound.routes(slot, fetch)]),
            *health.routes(slot),
            *documentation.routes(settings.project_name),
        ],
        lifespan=[slot.lifespan(settings)],
        exception_handlers={Exception: problems.handle},
        request_max_body_size=settings.max_file_size,
        cors_config=_cors(settings) if settings.allowed_origins else None,
        openapi_config=OpenAPIConfig(
            title=settings.project_name,
            version=__version__,
            description="Send messages and read what became of each. A `202` means: committed, never lost.",
            path="/schema",
            render_plugins=[JsonRenderPlugin()],
            servers=[Server(url="/")],
            components=Components(
                security_schemes={
                    "apiKey": SecurityScheme(
                        type="http", scheme="bearer", description="A key of `neoforge keys create`."
                    )
                }
            ),
        ),
        logging_config=None,
        debug=False,
    )
    _document_request(app, path)
    app.asgi_handler = emails.in_front(app.asgi_handler, slot, path)
    return app


def create_app_from_environment() -> Litestar:
    """For uvicorn's `--factory`. Raises SettingsError."""
    settings = Settings.from_environment(os.environ)
    configure_logging(settings)
    app = create_app(settings)
    # The collector walked over every request that waits for its commit, again and again: 28 % of the time under load.
    # What exists now lives as long as the process, and little of what a request makes is in a cycle.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    return app


def _cors(settings: Settings) -> CORSConfig:
    return CORSConfig(
        allow_origins=list(settings.allowed_origins),
        allow_methods=list(settings.allowed_methods),  # type: ignore[arg-type]  # checked by Litestar
        allow_headers=list(settings.allowed_headers),
        expose_headers=["Idempotent-Replayed", "Retry-After"],
    )


def _document_request(app: Litestar, path: str) -> None:
    """The handler takes the body as it came; its schema is that of the struct which decodes it."""
    (schema,), components = msgspec.json.schema_components([EmailRequest], ref_template="#/components/schemas/{name}")
    paths, documented = app.openapi_schema.paths, app.openapi_schema.components
    operation = paths[path].post if paths else None
    assert operation is not None
    assert documented.schemas is not None
    content: Any = {"application/json": {"schema": schema}}
    operation.request_body = RequestBody(content=content, description="The message.", required=True)
    documented.schemas.update(cast("dict[str, Schema]", components))
