"""The REST API, one module a resource; no SQL here."""
