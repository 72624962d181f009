"""A double of Amazon SES for the laboratory: `SendEmail` of its API v2 with a journal, misbehaving as `sink` does."""

from __future__ import annotations

import argparse
import asyncio
import base64
import signal
from pathlib import Path

from aiohttp import web

from neoforge_email.mailbox import Store

from .sink import GARBAGE, Orders, follow


class Double:
    """Takes raw messages into `store`, unless the orders say otherwise."""

    def __init__(self, store: Store, orders: Orders) -> None:
        self._store = store
        self._orders = orders

    async def send(self, request: web.Request) -> web.StreamResponse:
        given = await request.json()
        mode = self._orders.take()
        if mode == "defer":
            return _error(429, "TooManyRequestsException")
        number = 0
        if not mode.endswith("-before"):
            content = base64.b64decode(given["Content"]["Raw"]["Data"])
            number = self._store.add(given["FromEmailAddress"], given["Destination"]["ToAddresses"], content).number
        match mode.partition("-")[0]:
            case "silent":
                await asyncio.sleep(3600)
            case "garbage":
                return _broken(request, GARBAGE)
            case "drop":
                return _broken(request, b"")
            case "fail":
                return _error(500, "InternalServiceError")
        return web.json_response({"MessageId": f"{number:016x}"})


def _error(status: int, name: str) -> web.Response:
    return web.json_response({"message": name}, status=status, headers={"x-amzn-ErrorType": name})


def _broken(request: web.Request, octets: bytes) -> web.Response:
    assert isinstance(request.transport, asyncio.Transport)
    if octets:
        request.transport.write(octets)
        request.transport.close()
    else:
        request.transport.abort()
    return web.Response()


async def run(port: int, journal: Path, control: Path) -> None:
    store, orders, stopped = Store(keep=1, journal=journal), Orders(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v2/email/outbound-emails", Double(store, orders).send)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await follow(orders, control, stopped, lambda: asyncio.sleep(0))
    await runner.cleanup()
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ses_double")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    given = parser.parse_args()
    asyncio.run(run(given.port, given.journal, given.control))


if __name__ == "__main__":
    main()
