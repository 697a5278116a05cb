"""What every server here shares: its port, its names, and how it ends."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from stagecraft.errors import UserError, install

# Seconds that open connections get once the server was asked to end.
GRACE = 5
OWN = ("127.0.0.1", "localhost", "::1")  # addresses of this machine alone


def check(command: str) -> None:
    """Refuses to serve where what it needs is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            f"{command}: needs starlette and uvicorn: {install('serve')}"
        ) from None


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, so that the port is known and taken.

    Args:
        host: an address of this machine.
        port: 0 for any that is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--port={port}: cannot listen on {host}:{port} ({why}); give "
            "another --port, or 0 for any that is free"
        ) from None
    bound.listen(128)
    return bound


def address(host: str, port: int) -> str:
    """Returns the address of a server as a browser takes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, bound: socket.socket, *, stop: Callable = lambda: None) -> None:
    """Serves until ctrl-C or SIGTERM.

    Args:
        app: an ASGI application.
        bound: from `bind`.
        stop: called when the server is asked to end, before connections are closed.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, *signal):
            stop()
            super().handle_exit(*signal)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
    )
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        Server(config).run(sockets=[bound])
