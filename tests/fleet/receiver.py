"""Takes what Alertmanager posts, and keeps a journal of it: a line for each call, {"path": …, "body": …}.

`python receiver.py ADDRESS PORT JOURNAL`; Python's own library, nothing else.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Path(sys.argv[3]).open("a") as journal:
            journal.write(json.dumps({"path": self.path, "body": body}) + "\n")
        self.send_response(204)
        self.end_headers()


ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Receiver).serve_forever()
