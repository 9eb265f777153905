"""The server: one process with one model, by default on a loopback address."""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dmin.runtime.errors import DminError
from dmin.runtime.signals import StopSignals
from dmin.serve.gate import Gate

if TYPE_CHECKING:
    from dmin.serve.page import Desk


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Args:
        host: name or number of an interface of this machine.
        port: 0: any free port.

    Raises:
        DminError: the address is in use or not this machine's, or Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise DminError("dmin serve needs Gradio: pip install 'dmin[serve]'.")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        raise DminError(
            f"serve.host={host}, serve.port={port} cannot be opened ({error}). Choose another "
            f"port; serve.port=0 takes any free one."
        ) from error
    return found


def serve(
    desk: Desk, at: socket.socket, upload_mb: float, queue: int, token: str | None, tell: Callable
) -> None:
    """Serve the page until the process receives a stop signal.

    Args:
        desk: answers the questions.
        at: the listening socket.
        upload_mb: size of the largest picture accepted, in MB.
        queue: most waiting questions; further ones are refused.
        token: required from visitors; None: only this machine's visitors are accepted.
        tell: called with the address.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import
    import uvicorn
    from torch.nn.modules.module import register_module_forward_pre_hook

    from dmin.serve.page import mounted

    limit = int(3 * upload_mb * 1e6) + 2**20  # a picture and a mask, in base64
    gate = Gate(mounted(desk, upload_mb, queue), limit, token)
    options: dict[str, Any] = {"log_level": "critical", "ws": "none", "lifespan": "on"}
    server = uvicorn.Server(uvicorn.Config(gate, timeout_graceful_shutdown=2, **options))
    host, port = at.getsockname()[:2]
    query = "" if token is None else f"?token={token}"
    tell(f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}")
    # uvicorn ends at SIGINT and SIGTERM, and then raises them once more.
    with StopSignals() as signals, suppress(KeyboardInterrupt):
        signals.listen(lambda signum: setattr(server, "should_exit", True))
        server.run(sockets=[at])
    # Otherwise the process would wait for a running answer; this ends it at its next layer.
    register_module_forward_pre_hook(_end)


def _end(module: Any, inputs: Any) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise SystemExit
