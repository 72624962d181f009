"""The browsable API documentation, from files in the package: it works without the internet."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from neoforge_email.errors import NeoforgeError, NotFound

FILES = Path(__file__).parent / "docs"
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png"}
SECURITY_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="docs/favicon-32x32.png"><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script></body>
</html>
"""
START = """SwaggerUIBundle({url: "schema/openapi.json", dom_id: "#swagger-ui", deepLinking: true, tryItOutEnabled: true,
    persistAuthorization: false, validatorUrl: null});
"""


def routes(title: str) -> Sequence[HTTPRouteHandler]:
    """The page at /docs, its files, and what each problem type means at /docs/problems."""

    @get("/docs", include_in_schema=False, media_type="text/html")
    async def page() -> Response[str]:
        return _answer(PAGE.format(title=html.escape(title)), "text/html")

    @get("/docs/{name:str}", include_in_schema=False)
    async def file(name: FromPath[str]) -> Response[Any]:
        if name == "problems":
            return _answer(_problems(title), "text/html")
        if name == "start.js":
            return _answer(START, "text/javascript")
        path = FILES / name
        if name not in {item.name for item in FILES.iterdir()} or path.suffix not in MEDIA_TYPES:
            raise NotFound("There is no such page; /docs is the first one.")
        return _answer(path.read_bytes(), MEDIA_TYPES[path.suffix])

    return [page, file]


def _answer(content: str | bytes, media_type: str) -> Response[Any]:
    return Response(
        content,
        media_type=media_type,
        headers={"Content-Security-Policy": SECURITY_POLICY, "Cache-Control": "max-age=3600"},
    )


def _problems(title: str) -> str:
    """Every error that the API answers with, from the classes themselves."""
    kinds = {kind.type: kind for kind in _family(NeoforgeError) if kind.type not in INTERNAL}
    rows = "".join(
        f'<tr id="{kind.type}"><td>{kind.status}</td><td><code>{kind.type}</code></td><td>{html.escape(kind.title)}</td></tr>'
        for kind in sorted(kinds.values(), key=lambda kind: (kind.status, kind.type))
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}: problems</title></head>'
        f"<body><h1>What an answer's <code>type</code> means</h1><table>{rows}</table></body></html>"
    )


INTERNAL = {"settings", "provider-unavailable"}


def _family(root: type[NeoforgeError]) -> list[type[NeoforgeError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _family(child))]
