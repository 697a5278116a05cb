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
DRAINED = 2**26  # bytes of one that is too long, read so that its sender hears why
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
        hosts: names by which the server may be called, without the port; () for any.
        port: the port.
        open_paths: may be read without a session.
    """

    most = MOST
    closed = "no session: open the address that the command printed"

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
            if status == 413:
                await _drained(receive)
            answer = self.answer(status, text)
            await answer(scope, receive, _with_headers(send))
            return
        await self.app(scope, _limited(receive, self.most), _with_headers(send))

    def answer(self, status, text):
        """Returns the response that refuses a request."""
        return JSONResponse({"error": text}, status)

    def _refusal(self, scope):
        """Returns (status, one line), or None for a request that may pass."""
        headers = Headers(scope=scope)
        if self.names and headers.get("host") not in self.names:
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
            if len(length) > 18 or int(length) > self.most:
                return 413, f"a request holds at most {self.most} bytes"
        elif scope["method"] not in ("GET", "HEAD"):
            return 405, "expected GET or POST"
        if scope["path"] in self.open_paths or self.holds(headers):
            return None
        return 401, self.closed

    def holds(self, headers):
        """Returns whether a request's cookie is the session's."""
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == cookie(self.port) and hmac.compare_digest(value, self.token):
                return True
        return False


class KeyGuard(Guard):
    """ASGI middleware of an OpenAI-compatible server: a key, or none, opens it.

    Args: as of `Guard`; token is the key, "" for none.
    """

    most = 2**22
    closed = "expected the server's key, as in Authorization: Bearer KEY"

    def answer(self, status, text):
        """Returns the response that refuses a request, in OpenAI's form."""
        code = "invalid_api_key" if status == 401 else None
        return JSONResponse(error(text, code=code), status)

    def holds(self, headers):
        """Returns whether a request brings the key."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        return not self.token or hmac.compare_digest(given, self.token.encode())


def error(text: str, *, param: str | None = None, code: str | None = None) -> dict:
    """Returns an error in OpenAI's form."""
    kind = "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def _limited(receive, most):
    """Returns a receive that ends a body which is longer than it said."""
    seen = 0

    async def limited():
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            return {"type": "http.disconnect"}
        return message

    return limited


async def _drained(receive):
    """Reads a body away; a sender that is cut off may never see the answer."""
    seen, more = 0, True
    while more and seen < DRAINED:
        message = await receive()
        seen += len(message.get("body", b""))
        more = message.get("more_body", False)


def _with_headers(send):
    async def sending(message):
        if message["type"] == "http.response.start":
            own = {name.lower().encode() for name in HEADERS}
            others = [h for h in message["headers"] if h[0].lower() not in own]
            ours = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            message = message | {"headers": [*others, *ours]}
        await send(message)

    return sending
