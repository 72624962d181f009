# ruff: noqa: T201
"""Say which TLS a server speaks to a client that verifies its certificate and name: tls.py NAME PORT [CA]."""

import socket
import ssl
import sys

name, port, *ca = sys.argv[1:]
context = ssl.create_default_context(cafile=ca[0] if ca else None)
context.set_alpn_protocols(["h2", "http/1.1"])
with socket.create_connection((name, int(port)), 5) as raw, context.wrap_socket(raw, server_hostname=name) as tls:
    print(tls.version(), tls.selected_alpn_protocol() or "-")
