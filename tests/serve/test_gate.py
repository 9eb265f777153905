"""Who is let in, and where the page listens."""

import asyncio
import importlib.util

import pytest

from dmin.runtime.errors import DminError
from dmin.serve.gate import Gate
from dmin.serve.server import bound

HOME = "127.0.0.1:7860"
ASK = "/gradio_api/queue/join"


async def behind(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"behind"})


def asked(path="/", token=None, method="GET", host=HOME, **headers):
    """Status, headers and text of the answer to a request."""
    path, _, query = path.partition("?")
    said = {"host": host, **{name.replace("_", "-"): text for name, text in headers.items()}}
    encoded = [(name.encode(), text.encode()) for name, text in said.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    sent = []

    async def send(message):
        sent.append(message)

    gate = Gate(behind, limit=1000, token=token)
    asyncio.run(gate({**scope, "headers": encoded}, None, send))
    found = {name.decode(): text.decode() for name, text in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"].decode()


def test_this_machine_asks_by_its_own_name():
    for host in (HOME, "localhost:7860", "[::1]:7860"):
        assert asked(host=host)[0] == 200
    status, _, text = asked(host="evil.example:7860")  # a name that was made to lead here
    assert status == 403 and "127.0.0.1" in text


def test_the_browser_is_told_to_ask_no_other_machine():
    policy = asked()[1]["content-security-policy"]
    assert policy.startswith("default-src 'self'; ") and "http" not in policy


def test_another_page_does_not_ask_in_the_name_of_who_reads_it():
    assert asked(ASK, method="POST", content_length="9", origin=f"http://{HOME}")[0] == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9", "null"):
        status, _, text = asked(ASK, method="POST", content_length="9", origin=origin)
        assert status == 403 and "other pages" in text


def test_others_need_the_token():
    assert asked(host="lab.example", token="secret")[0] == 403
    assert asked("/?token=wrong", token="secret")[0] == 403
    assert asked(token="secret", cookie="dmin-token=wrong")[0] == 403
    status, headers, _ = asked("/?token=secret", token="secret")
    assert status == 303 and headers["location"] == "/" and "HttpOnly" in headers["set-cookie"]
    cookie = headers["set-cookie"].partition(";")[0]
    assert asked(token="secret", host="lab.example", cookie=f'a:b="; {cookie}')[0] == 200
    assert asked("/?token=")[0] == 200 and asked("/?token=x")[0] == 200  # there is none


@pytest.mark.parametrize(
    "path", ["upload", "file=/etc/passwd", "proxy=http://a", "stream/x", "run/x", "call/x"]
)
def test_no_other_door_of_gradio_is_open(path):
    assert asked(f"/gradio_api/{path}")[0] == 404
    assert asked(f"/gradio_api/{path}", method="POST", content_length="9")[0] == 404


def test_a_request_says_its_size_and_is_bounded():
    assert asked(ASK, method="POST", content_length="1000")[0] == 200
    for size in ({"content_length": "1001"}, {"content_length": "-1"}, {}):
        status, _, text = asked(ASK, method="POST", **size)
        assert status == 413 and "are refused" in text


def test_a_port_that_is_taken_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(DminError, match=rf"serve.port={port} .*serve.port=0"):
            bound("127.0.0.1", port)
    for host, port in (("192.0.2.1", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 70000)):
        with pytest.raises(DminError, match=f"serve.host={host}, serve.port={port}"):
            bound(host, port)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DminError, match=r"pip install 'dmin\[serve\]'"):
        bound("127.0.0.1", 0)
