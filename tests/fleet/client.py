"""A client of the edge for the tests, run on a machine outside of the fleet; Python's own library, nothing else.

Reads one JSON object from standard input and prints one. {"do": "request", …}: one request, its answer.
{"do": "load", …}: many messages with idempotency keys, each repeated under its key until the edge has taken it; a line
`accepted N` for every fiftieth.
"""

import base64
import http.client
import json
import ssl
import sys
import threading
import time
from typing import Any


def connect(spec: dict[str, Any], seconds: float = 10) -> http.client.HTTPConnection:
    if spec.get("plain"):
        return http.client.HTTPConnection(spec["host"], timeout=seconds)
    context = ssl.create_default_context(cadata=spec["ca"])
    return http.client.HTTPSConnection(spec["host"], timeout=seconds, context=context)


def request(spec: dict[str, Any]) -> dict[str, Any]:
    """The answer's status, headers (names in lower case) and text."""
    body = b"x" * spec["size_bytes"] if "size_bytes" in spec else base64.b64decode(spec.get("body", ""))
    connection = connect(spec)
    connection.request(spec.get("method", "GET"), spec["path"], body or None, spec.get("headers", {}))
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return {"status": answer.status, "headers": headers, "text": answer.read().decode("utf-8", "replace")}


class Load:
    """`count` messages from `threads` clients over `seconds`, numbered, one recipient each."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.next = 0
        self.ids: dict[str, str] = {}
        self.repeats: dict[str, int] = {}
        self.failures: list[str] = []
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self.client) for _ in range(self.spec["threads"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - self.started
        return {"ids": self.ids, "repeats": self.repeats, "failures": self.failures, "seconds": round(seconds, 1)}

    def client(self) -> None:
        connection = connect(self.spec)
        while True:
            with self.lock:
                number = self.next
                self.next += 1
            if number >= self.spec["count"]:
                return
            time.sleep(max(0.0, self.started + number * self.spec["seconds"] / self.spec["count"] - time.monotonic()))
            connection = self.send(connection, number)

    def send(self, connection: http.client.HTTPConnection, number: int) -> http.client.HTTPConnection:
        recipient = self.spec.get("to", "{}@example.com").format(f"{self.spec['run']}-{number}")
        body = json.dumps({"to": recipient, "subject": f"Number {number}", "text": "Under way."})
        headers = {**self.spec["headers"], "Idempotency-Key": f"{self.spec['run']}-{number}"}
        reason = "patience is over"
        while time.monotonic() < self.started + self.spec["patience_seconds"]:
            try:
                connection.request("POST", self.spec["path"], body, headers)
                answer = connection.getresponse()
                text = answer.read()
                reason = str(answer.status)
                if answer.status == http.client.ACCEPTED:
                    self.accept(recipient, json.loads(text)["id"])
                    return connection
                if answer.status < http.client.INTERNAL_SERVER_ERROR and answer.status != http.client.TOO_MANY_REQUESTS:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = type(error).__name__
                connection.close()
                connection = connect(self.spec)
            with self.lock:
                self.repeats[reason] = self.repeats.get(reason, 0) + 1
            time.sleep(0.2)
        with self.lock:
            self.failures.append(f"{recipient}: {reason}")
        return connection

    def accept(self, recipient: str, email_id: str) -> None:
        with self.lock:
            self.ids[recipient] = email_id
            if len(self.ids) % 50 == 0:
                print(f"accepted {len(self.ids)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(request(given) if given["do"] == "request" else Load(given).run()))  # noqa: T201
