"""What stands before every request: whose it is, and what may be in it.

A page on loopback is reached by every page that the same browser shows. A request must
name this server (against DNS rebinding), come from its own pages, and hold the session
that the printed token opens; what changes anything is JSON, which no other site can
send unasked. Sources: the OWASP cheat sheets on CSRF and on HTTP headers.
"""

import hmac
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MOST = 2**16  # bytes of a request's body
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def cookie(port: int) -> str:
    """Returns the session cookie's name; a browser keeps one jar for all ports."""
    return f"stagecraft_{port}"


def new_token() -> str:
    """Returns 192 random bits as text."""
    return secrets.token_urlsafe(24)


class Guard:
    """ASGI middleware that refuses what is not for this server, or not from its pages.

    Args:
        app: what it guards.
        token: what opens a session.
        hosts: names by which the server may be called, without the port.
        port: the port.
        open_paths: may be read without a session.
    """

    def __init__(self, app, *, token, hosts=LOOPBACK, port, open_paths=()):
        self.app, self.token = app, token
        self.port, self.open_paths = port, open_paths
        self.names = {f"{host}:{port}" for host in hosts}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused:
            status, text = refused
            await _answer(JSONResponse({"error": text}, status), scope, receive, send)
            return
        await self.app(scope, _limited(receive), _with_headers(send))

    def _refusal(self, scope):
        """Returns (status, one line), or None for a request that may pass."""
        headers = Headers(scope=scope)
        if headers.get("host") not in self.names:
            return 421, "another name than this server's: open the address it printed"
        origin = headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in self.names:
            return 403, "requests of other sites are refused"
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip()
            if kind != "application/json":
                return 415, "expected Content-Type: application/json"
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "expected Content-Length"
            if int(length) > MOST:
                return 413, f"a request holds at most {MOST} bytes"
        elif scope["method"] not in ("GET", "HEAD"):
            return 405, "expected GET or POST"
        if scope["path"] in self.open_paths or self.holds(headers):
            return None
        return 401, "no session: open the address that the command printed"

    def holds(self, headers):
        """Returns whether a request's cookie is the session's."""
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == cookie(self.port) and hmac.compare_digest(value, self.token):
                return True
        return False


def _limited(receive):
    """Returns a receive that ends a body which is longer than it said."""
    seen = 0

    async def limited():
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST:
            return {"type": "http.disconnect"}
        return message

    return limited


def _with_headers(send):
    async def sending(message):
        if message["type"] == "http.response.start":
            own = {name.lower().encode() for name in HEADERS}
            others = [h for h in message["headers"] if h[0].lower() not in own]
            ours = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            message = message | {"headers": [*others, *ours]}
        await send(message)

    return sending


async def _answer(response, scope, receive, send):
    await response(scope, receive, _with_headers(send))
