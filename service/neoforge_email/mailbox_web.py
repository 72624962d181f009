"""The mailbox's web page and its JSON. The page itself is static (`mailbox_page/`) and fills itself from the JSON.

GET /api/messages?limit=200&after=N&message_id=<…>   newest first, with the number of all arrivals
GET /api/messages/{n}    headers, text, html, attachments
GET /messages/{n}/html   the HTML body alone, for a sandboxed frame: no scripts, nothing fetched
GET /messages/{n}/raw    as it came
"""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.errors
import email.header
import email.message
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from .mailbox import Mail, Store

PAGE = Path(__file__).parent / "mailbox_page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
REQUEST_SECONDS = 10.0
OWN_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
BODY_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'"


class Refusal(Exception):  # an answer, not a fault
    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Answer:
    def __init__(self, content: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.content, self.kind = "200 OK", content, kind
        self.headers = {"Content-Security-Policy": OWN_POLICY, **(headers or {})}


@contextlib.asynccontextmanager
async def web_server(store: Store, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Serve the page while the context lasts; gives the port. Raises OSError where it cannot listen."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_respond(store, head.decode("latin-1")))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, host, port, limit=16384)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _respond(store: Store, head: str) -> bytes:
    method = head.partition(" ")[0]
    try:
        if method not in {"GET", "HEAD"}:
            raise Refusal("405 Method Not Allowed", "only GET and HEAD are answered")
        _check_host(head)
        answer = _route(store, _target(head))
    except Refusal as refusal:
        answer = _json({"detail": refusal.detail})
        answer.status = refusal.status
    headers = {
        **answer.headers,
        "Content-Type": answer.kind,
        "Content-Length": str(len(answer.content)),
        "Cache-Control": "no-store",
        "Connection": "close",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    lines = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (b"" if method == "HEAD" else answer.content)


def _target(head: str) -> str:
    match = re.match(r"[A-Z]+ (/\S*) HTTP/1\.[01]\r\n", head)
    if match is None:
        raise Refusal("400 Bad Request", "this is not a request for a page")
    return match[1]


def _check_host(head: str) -> None:
    """Refuse names of the public DNS: no web site may read the mailbox by rebinding its name to this address."""
    match = re.search(r"^Host:[ \t]*(\S*?)(?::\d+)?[ \t]*\r$", head, re.IGNORECASE | re.MULTILINE)
    host = match[1].strip("[]") if match else ""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return
    if not host or ("." in host and not host.endswith(".localhost")):
        raise Refusal("421 Misdirected Request", "open this page by its IP address or as localhost")


def _route(store: Store, target: str) -> Answer:
    parts = urlsplit(f"http://mailbox{target}")
    if parts.path in FILES:
        name, kind = FILES[parts.path]
        return Answer((PAGE / name).read_bytes(), kind)
    if parts.path == "/api/messages":
        return _json(_list(store, parse_qs(parts.query)))
    match = re.fullmatch(r"/(api/)?messages/(\d{1,12})(?:/(html|raw))?", parts.path)
    mail = store.get(int(match[2])) if match else None
    if match is None or mail is None or bool(match[1]) == bool(match[3]):
        raise Refusal("404 Not Found", "there is no such page or message; only the newest are kept")
    if match[3] == "raw":
        return Answer(mail.content, "text/plain; charset=utf-8", {"Content-Security-Policy": BODY_POLICY})
    view = _view(mail)
    if match[3] == "html":
        if view["html"] is None:
            raise Refusal("404 Not Found", "this message has no HTML body")
        policy = {"Content-Security-Policy": BODY_POLICY}
        return Answer(view["html"].encode("utf-8", "replace"), "text/html; charset=utf-8", policy)
    return _json(view)


def _json(value: object) -> Answer:
    return Answer(json.dumps(value).encode(), "application/json")


def _list(store: Store, query: Mapping[str, list[str]]) -> dict[str, Any]:
    limit, after = (
        int(query[name][-1]) if name in query and re.fullmatch(r"\d{1,12}", query[name][-1]) else default
        for name, default in (("limit", 200), ("after", 0))
    )
    wanted = query.get("message_id")
    found = [mail for mail in store.mails if mail.number > after and (wanted is None or mail.message_id in wanted)]
    newest = found[-limit:][::-1] if limit else []
    return {"arrived": store.arrived, "kept": len(store.mails), "messages": [_summary(mail) for mail in newest]}


def _summary(mail: Mail) -> dict[str, Any]:
    head = email.message_from_bytes(mail.content.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    return {
        "n": mail.number,
        "at": mail.at.isoformat(),
        "message_id": mail.message_id,
        "subject": _decode(head["Subject"]),
        "from": _decode(head["From"]),
        "to": _decode(head["To"]),
        "sender": mail.sender,
        "recipients": mail.recipients,
        "size_bytes": len(mail.content),
    }


def _view(mail: Mail) -> dict[str, Any]:
    message = email.message_from_bytes(mail.content)
    bodies: dict[str, str] = {}
    attachments = []
    for part in message.walk():
        kind = part.get_content_type()
        if part.is_multipart():
            continue
        content = part.get_payload(decode=True)
        payload = content if isinstance(content, bytes) else b""
        if (
            kind in {"text/plain", "text/html"}
            and kind not in bodies
            and part.get_content_disposition() != "attachment"
        ):
            bodies[kind] = _text(payload, part)
        else:
            attachments.append({"name": _decode(part.get_filename()), "type": kind, "size_bytes": len(payload)})
    return {
        **_summary(mail),
        "headers": [[name, _decode(value)] for name, value in message.items()],
        "text": bodies.get("text/plain"),
        "html": bodies.get("text/html"),
        "attachments": attachments,
    }


def _text(payload: bytes, part: email.message.Message) -> str:
    try:
        return payload.decode(part.get_content_charset() or "utf-8", "replace")
    except LookupError:
        return payload.decode("utf-8", "replace")


def _decode(value: object) -> str:
    """A header as a person reads it; one that cannot be decoded stays as it came."""
    if value is None:
        return ""
    unfolded = re.sub(r"\r?\n[ \t]*", " ", str(value))
    try:
        return str(email.header.make_header(email.header.decode_header(unfolded)))
    except (email.errors.HeaderParseError, LookupError, ValueError):
        return unfolded
