#!/usr/bin/python3 -I
"""The store of backups: takes what the fleet's machines bring over TLS, and gives nothing back.

neoforge-backup-store PORT MACHINE; KEEP_DAYS says how long each kind is kept.

A machine shows by its certificate who it is. `PUT /NAME` brings a backup, `POST /NAME` says that it was whole; what is there
already is never written again. So a machine that was broken into can add files in its own name, and neither read, change nor
delete one. A backup that is whole makes its predecessors go, once they are old enough.
"""

import json
import os
import re
import shutil
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HOME = Path("/opt/backups/neoforge")
DUMPS = Path("/opt/neoforge/backups")
# What a name begins with: its kind and where it lies. What the fleet has one of is brought by the store's own machine alone;
# of the rest each machine has its own, in a directory of its name.
SERIES = {
    "neoforge_full": ("dump", DUMPS),
    "neoforge_schema": ("schema", DUMPS),
    "redis": ("redis", HOME),
    "config": ("configuration", HOME),
    "logs": ("logs", HOME),
}
OF_EACH_MACHINE = ("config", "logs")
NAME = re.compile(rf"/(({'|'.join(SERIES)})_(\d{{8}}_\d{{6}})\.(?:backup|sql|rdb|tar\.gz)\.age)")
# The guide's second name of a dump, and how long it has it.
SHORT = "neoforge_{}.backup.age"
SHORT_DAYS = 7
# The rest of the disk stays free: the monitoring stands on it too.
FREE = 0.05


class RefusedError(Exception):
    """Why something is not taken."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Store(BaseHTTPRequestHandler):
    """A machine's connection."""

    protocol_version = "HTTP/1.1"
    timeout = 300

    def setup(self) -> None:
        """Shake hands in the connection's own thread, so that one that is slow delays no other."""
        self.request.settimeout(10)
        self.request.do_handshake()
        super().setup()

    def do_PUT(self) -> None:
        """Take a backup, under another name until it is known to be whole."""
        self._answer(self._take)

    def do_POST(self) -> None:
        """Keep what was brought."""
        self._answer(self._keep)

    def _answer(self, act: Callable[[Path, re.Match[str]], None]) -> None:
        try:
            name = NAME.fullmatch(self.path)
            if not name:
                raise RefusedError(HTTPStatus.NOT_FOUND, "no backup has such a name")
            act(self._place(name) / name[1], name)
            status, why = HTTPStatus.CREATED, ""
        except RefusedError as refused:
            status, why = refused.status, f"{refused}\n"
            # The rest of what it brings is not read.
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", str(len(why)))
        self.end_headers()
        self.wfile.write(why.encode())

    def _place(self, name: re.Match[str]) -> Path:
        machine = next(value for ((key, value),) in self.connection.getpeercert()["subject"] if key == "commonName")
        directory = SERIES[name[2]][1]
        if name[2] in OF_EACH_MACHINE:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", machine):
                raise RefusedError(HTTPStatus.FORBIDDEN, "a machine's name cannot be that")
            directory /= machine
            directory.mkdir(mode=0o750, exist_ok=True)
        elif machine != self.server.machine:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"{self.server.machine} alone brings that")
        return directory

    def _take(self, path: Path, _: re.Match[str]) -> None:
        if path.exists():
            raise RefusedError(HTTPStatus.CONFLICT, "that is there already")
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                for piece in self._pieces():
                    usage = shutil.disk_usage(path.parent)
                    if usage.free < usage.total * FREE:
                        raise RefusedError(HTTPStatus.INSUFFICIENT_STORAGE, "the store's disk is full")
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _pieces(self) -> Iterator[bytes]:
        """Read a body whose length nobody knows yet; fails where the connection ends before it does."""
        while size := int(self.rfile.readline(32), 16):
            while size:
                piece = self.rfile.read(min(size, 1 << 20))
                if not piece:
                    raise ConnectionError("the connection ended within a backup")
                size -= len(piece)
                yield piece
            self.rfile.readline(2)
        self.rfile.readline(2)

    def _keep(self, path: Path, name: re.Match[str]) -> None:
        part = path.with_suffix(".part")
        if path.exists() or not part.exists():
            raise RefusedError(HTTPStatus.CONFLICT, "nothing was brought under that name")
        part.rename(path)
        if name[2] == "neoforge_full":
            (HOME / SHORT.format(name[3])).symlink_to(path)
            _forget(HOME, SHORT.format("*"), SHORT_DAYS)
        _forget(path.parent, f"{name[2]}_*", self.server.days[SERIES[name[2]][0]])


class Server(ThreadingHTTPServer):
    """What the connections share."""

    def __init__(self, port: int, machine: str, days: dict[str, int]) -> None:
        super().__init__(("", port), Store)
        self.machine = machine
        self.days = days
        credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile="/etc/neoforge/pki/ca.crt")
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(credentials / "tls.crt", credentials / "tls.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the signature is the library's
        """Say in one line what ended a connection."""
        print(f"<4>{client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr, flush=True)


def _forget(directory: Path, pattern: str, days: int) -> None:
    """Delete what is older, and what was never whole; symbolic links count by their own age."""
    for file in directory.glob(pattern):
        age = time.time() - file.lstat().st_mtime
        if age > days * 86400 or (file.suffix == ".part" and age > 86400):
            file.unlink()


if __name__ == "__main__":
    Server(int(sys.argv[1]), sys.argv[2], json.loads(os.environ["KEEP_DAYS"])).serve_forever()
