"""What the processes of the service import, with its awaits wrapped; the server that forks them imports it once."""

from importlib import import_module

from . import inject

with inject.installed():
    for name in (
        *("arq.cli", "uvicorn", "uvicorn.lifespan.on", "uvicorn.protocols.http.httptools_impl", "uvicorn.loops.uvloop"),
        *("neoforge_email.cli", "neoforge_email.serve", "neoforge_email.app", "neoforge_email.worker"),
        *("neoforge_email.providers.sendgrid", "neoforge_email.providers.ses", "neoforge_email.providers.smtp"),
    ):
        import_module(name)
