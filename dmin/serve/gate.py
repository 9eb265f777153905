"""Access control of the server: which hosts, tokens and request sizes are accepted."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]

COOKIE = "dmin-token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Paths that the page uses. All others that Gradio serves, files and uploads among them, are closed.
_API = ("queue/", "component_server", "heartbeat/", "cancel")
_FILES = ("/assets/", "/static/", "/theme.css", "/config", "/favicon.ico")
OPEN = (*_FILES, *(f"/gradio_api/{path}" for path in _API))
# The browser loads nothing from other machines, whatever a caption contains.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Gate:
    """An ASGI application that checks requests before it passes them to another.

    Args:
        app: the application behind it.
        limit: most bytes of a request.
        token: required from visitors. None: only this machine's visitors, and only under a loopback
            host name, because another site's name may resolve to this machine (DNS rebinding).
    """

    def __init__(self, app: Any, limit: int, token: str | None = None) -> None:
        self.app, self.limit, self.token = app, limit, token

    async def __call__(self, scope: Message, receive: Any, send: Callable[..., Awaitable]) -> None:
        """Pass a request on, or answer it with the reason why it is refused."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = _encoded(
                    {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                )
                message["headers"] = [*message["headers"], *own]
            await send(message)

        answer = self._answer(scope) if scope["type"] == "http" else None
        if answer is None:
            return await self.app(scope, receive, guarded)
        status, text, more = answer
        headers = _encoded({"content-type": "text/plain; charset=utf-8", **more})
        await guarded({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def _answer(self, scope: Message) -> tuple[int, str, dict[str, str]] | None:
        """Return status, text and headers of a refusal; None if the request is passed on."""
        headers = {key.decode("latin-1"): v.decode("latin-1") for key, v in scope["headers"]}
        host, path, close = headers.get("host", ""), scope["path"], {"connection": "close"}
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self._is_token(given):
            cookie = f"{COOKIE}={given}; HttpOnly; SameSite=Lax; Path=/"
            return 303, "", {"location": "/", "set-cookie": cookie}
        if self.token is None and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return 403, "Only this machine may open this page: use the address 127.0.0.1.", close
        pairs = (each.strip().partition("=") for each in headers.get("cookie", "").split(";"))
        known = any(name == COOKIE and self._is_token(value) for name, _, value in pairs)
        if self.token is not None and not known:
            return 403, "Open the address that `dmin serve` printed, with its token.", close
        if "origin" in headers and urlsplit(headers["origin"]).netloc != host:
            return 403, "Requests from other pages are refused.", close
        if path != "/" and not path.startswith(OPEN):
            return 404, "There is no such page.", close
        size = headers.get("content-length", "" if scope["method"] == "POST" else "0")
        if not size.isdecimal() or int(size) > self.limit:
            return 413, f"Requests of more than {self.limit / 1e6:,.0f} MB are refused.", close
        return None

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
