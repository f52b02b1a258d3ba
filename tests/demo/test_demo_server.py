"""The demo's server as a client sees it: what it answers, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from small_models import NUM_TOKENS, micro_model

from dove_fast.demo import DemoServer, Gallery, Reconstruction, connection
from dove_fast.demo import server as demo_server
from dove_fast.demo.guard import PAGE_HEADER

PHOTO = (Path(__file__).parents[2] / "examples" / "photos" / "chelsea.jpg").read_bytes()


def ask(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str):
    """Return (status, headers, body as it came); a POST is the page's, unless `headers` say otherwise."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        client.request(method, path, body, {PAGE_HEADER: "test", **given} if method == "POST" else given)
        response = client.getresponse()
        return response.status, response.headers, response.read()
    finally:
        client.close()


def ask_json(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str):
    status, kinds, content = ask(server, method, path, body, **headers)
    assert kinds["Content-Type"] == "application/json"
    return status, json.loads(content)


def post(length: int | str) -> bytes:
    """Begin a request to read a picture of so many bytes."""
    head = ("POST /api/tokenize HTTP/1.1", "Host: localhost", f"{PAGE_HEADER}: test", f"Content-Length: {length}")
    return "\r\n".join([*head, "", ""]).encode()


def refused(answer, status: int, text: str) -> None:
    assert answer[0] == status
    assert list(answer[1]) == ["error"] and text in answer[1]["error"]


def raw(server: DemoServer, request: bytes) -> bytes:
    """Send bytes that are no proper request, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_the_page_and_its_files(model, serve):
    server = serve(model)
    assert server.url == f"http://127.0.0.1:{server.port}"
    for path, kind, text in (
        ("/", "text/html", b"<!DOCTYPE html>"),
        ("/style.css", "text/css", b"color-scheme"),
        ("/script.js", "text/javascript", b'"use strict"'),
    ):
        status, headers, content = ask(server, "GET", path)
        assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert text in content and int(headers["Content-Length"]) == len(content)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" and headers["Set-Cookie"] is None
        assert b"http://" not in content and b"https://" not in content


def test_what_the_page_asks_for(model, serve):
    """A picture, and reconstructions of it, are the gallery's; without logging, and with the same headers."""
    gallery = Gallery(model)
    server = serve(gallery, name="micro")
    status, about = ask_json(server, "GET", "/api/model")
    assert status == 200 and (about["name"], about["num_tokens"], about["reads_queries"]) == (
        "micro",
        NUM_TOKENS,
        False,
    )
    assert (about["image_size"], about["num_features"], about["device"], about["dtype"]) == (16, 16, "cpu", "float32")
    status, reading = ask_json(server, "POST", "/api/tokenize", PHOTO)
    assert status == 200
    expected = dataclasses.asdict(gallery.read(PHOTO))
    assert reading.pop("id") != expected.pop("id") and reading == expected


def test_reconstructions(model, serve, capfd):
    gallery = Gallery(model)
    server = serve(gallery)
    name = gallery.read(PHOTO).id
    status, headers, content = ask(server, "GET", f"/api/reconstructions/{name}/4,1,{NUM_TOKENS}")
    assert status == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
    expected = [dataclasses.asdict(one) for one in gallery.reconstruct(name, [4, 1, NUM_TOKENS])]
    assert json.loads(content) == {"reconstructions": expected}
    assert capfd.readouterr() == ("", "")


def test_bad_pictures(model, serve):
    server = serve(model)
    refused(ask_json(server, "POST", "/api/tokenize", b"hello"), 422, "this picture cannot be read: not an image")
    refused(ask_json(server, "POST", "/api/tokenize", PHOTO[:3000]), 422, "this picture cannot be read: ")
    refused(ask_json(server, "POST", "/api/tokenize", b""), 400, "the file is empty")
    # It still serves.
    assert ask(server, "POST", "/api/tokenize", PHOTO)[0] == 200


def test_a_file_that_is_too_large(model, serve, monkeypatch):
    monkeypatch.setattr(demo_server, "MAX_BYTES", 1 << 20)
    server = serve(model)
    # The answer comes although the client sends all of it first.
    answer = ask_json(server, "POST", "/api/tokenize", bytes(3 << 20))
    refused(answer, 413, "the file has 3.0 MiB, more than the 1 that are taken")


def test_unknown_pictures_and_token_counts(model, serve):
    gallery = Gallery(model, batch_size=4)
    server = serve(gallery)
    refused(ask_json(server, "GET", "/api/reconstructions/never/1"), 404, "this picture is no longer kept")
    name = gallery.read(PHOTO).id
    for counts in ("0", str(NUM_TOKENS + 1), "1,17"):
        refused(ask_json(server, "GET", f"/api/reconstructions/{name}/{counts}"), 400, "must be from 1 to 16, got")
    for counts in ("1,", "-1", "x", "1.5", "%31", "9" * 5000):
        refused(ask_json(server, "GET", f"/api/reconstructions/{name}/{counts}"), 400, "token counts are whole numbers")
    refused(ask_json(server, "GET", f"/api/reconstructions/{name}/1,2,3,4,5"), 400, "expected 1 to 4 token counts")


def test_queries(model, reading_model, serve):
    server = serve(model)
    refused(ask_json(server, "POST", "/api/tokenize?query=cat", PHOTO), 400, "this model has no tokenizer")
    assert ask(server, "POST", "/api/tokenize?query=%20", PHOTO)[0] == 200
    gallery = Gallery(reading_model)
    server = serve(gallery)
    assert ask_json(server, "GET", "/api/model")[1]["reads_queries"]
    status, reading = ask_json(server, "POST", "/api/tokenize?query=red%20cat%20", PHOTO)
    assert status == 200 and reading["eos"] == gallery.read(PHOTO, "red cat").eos != gallery.read(PHOTO).eos
    refused(ask_json(server, "POST", "/api/tokenize?query=" + "cat%20" * 40, PHOTO), 400, "must have at most")
    refused(ask_json(server, "POST", "/api/tokenize?query=%ff", PHOTO), 400, "utf-8")


@pytest.mark.parametrize(
    "path",
    ["/index.html", "/../gallery.py", "/style.css/", "/api", "/api/tokenize", "/api/reconstructions/a", "/%2e%2e/"],
)
def test_nothing_else_is_there(model, serve, path):
    """No path leads to a file that is not one of the page's."""
    refused(ask_json(serve(model), "GET", path), 404, "there is nothing here")


def test_other_methods_and_broken_requests(model, serve):
    server = serve(model)
    refused(ask_json(server, "POST", "/", b"x"), 404, "there is nothing here")
    refused(ask_json(server, "DELETE", "/api/model"), 501, "Unsupported method")
    status, headers, content = ask(server, "HEAD", "/")
    assert status == 501 and content == b"" and headers["X-Content-Type-Options"] == "nosniff"
    assert (
        b" 411 " in raw(server, post(3).replace(b"Content-Length: 3", b"Transfer-Encoding: chunked")).split(b"\r\n")[0]
    )
    for length in ("-5", "many", "9" * 400):
        assert b" 411 " in raw(server, post(length) + b"abc").split(b"\r\n")[0]
    assert b'{"error"' in raw(server, b"nonsense\r\n\r\n")
    # A client that goes away in the middle gets nothing, and nobody minds.
    assert raw(server, post(1000) + b"abc") == b""
    assert b" 400 " in raw(server, b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n").split(b"\r\n")[0]
    assert ask(server, "GET", "/")[0] == 200


def test_other_sites_pages_are_refused(model, serve):
    server = serve(model)
    for site in ("cross-site", "same-site"):
        answer = ask_json(server, "POST", "/api/tokenize", PHOTO, Sec_Fetch_Site=site)
        refused(answer, 403, "only the demo's own page may ask")
    assert ask(server, "POST", "/api/tokenize", PHOTO, Sec_Fetch_Site="same-origin")[0] == 200
    # A link to the page is no harm.
    assert ask(server, "GET", "/", Sec_Fetch_Site="cross-site")[0] == 200
    for origin in (
        "http://example.com",
        "null",
        f"https://127.0.0.1:{server.port}",
        f"http://localhost:{server.port}",
        "http://127.0.0.1:1",
        f"http://127.0.0.1:{server.port}/",
        "",
    ):
        for method, path, body in (("POST", "/api/tokenize", PHOTO), ("GET", "/api/model", None), ("GET", "/", None)):
            refused(ask_json(server, method, path, body, Origin=origin), 403, "only the demo's own page may ask")
    assert ask(server, "POST", "/api/tokenize", PHOTO, Origin=server.url)[0] == 200
    # Over plain http within a network a browser says no more than this, and a form cannot send the header.
    answer = ask_json(server, "POST", "/api/tokenize", PHOTO, **{PAGE_HEADER: ""})
    refused(answer, 403, f"only the demo's own page may ask; it sends {PAGE_HEADER}")
    # What a browser asks first, where a page of another site would send it.
    status, headers, _ = ask(server, "OPTIONS", "/api/tokenize", Origin="http://example.com")
    assert status == 501 and not [name for name in headers if name.lower().startswith("access-control")]


def test_other_hosts_are_refused(model, serve):
    """A site that gives its name this machine's address would have the page's origin."""
    server = serve(model)
    for host in (
        "example.com",
        f"example.com:{server.port}",
        "localhost.example.com",
        "a@localhost",
        "0.0.0.0",
        "10.0.0.1",
        "",
    ):
        for method, path, body in (("POST", "/api/tokenize", PHOTO), ("GET", "/api/model", None), ("GET", "/", None)):
            answer = ask_json(server, method, path, body, Host=host, Origin=f"http://{host}")
            refused(answer, 421, "open the address that it printed")
    for host in ("127.0.0.1", "localhost", "LocalHost", "[::1]"):
        for port in (f":{server.port}", ":9999", ""):
            # Through a tunnel the port is another.
            headers = {"Host": host + port, "Origin": f"http://{host}{port}"}
            assert ask(server, "POST", "/api/tokenize", PHOTO, **headers)[0] == 200
            assert ask(server, "GET", "/", **headers)[0] == 200
    assert raw(server, b"GET / HTTP/1.0\r\n\r\n").split(b"\r\n")[0].split(b" ")[1] == b"421"
    twice = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: example.com\r\n\r\n"
    assert raw(server, twice).split(b"\r\n")[0].split(b" ")[1] == b"421"


def test_hosts_where_other_machines_are_let_in(model, serve, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lan")
    server = serve(model, host="0.0.0.0")
    assert not server.is_local and server.url == f"http://127.0.0.1:{server.port}"
    for host in ("localhost", "127.0.0.1", "box.lan", "box", "BOX.local", "192.168.1.7", "[fd00::1]"):
        assert ask(server, "GET", "/", Host=f"{host}:{server.port}")[0] == 200
    for host in ("example.com", "box.example.com", "0.0.0.0", "[::]", "[box]", "1.2.3"):
        refused(ask_json(server, "GET", "/", Host=f"{host}:{server.port}"), 421, "open the address that it printed")
    assert serve(model).is_local and serve(model, host="localhost").is_local


def test_clients_at_once(model, serve):
    """All get their own picture's tokens."""
    gallery = Gallery(model)
    server = serve(gallery)
    expected = gallery.read(PHOTO).eos
    found = []

    def client() -> None:
        reading = ask_json(server, "POST", "/api/tokenize", PHOTO)[1]
        made = ask_json(server, "GET", f"/api/reconstructions/{reading['id']}/3")[1]
        found.append((reading["id"], reading["eos"], made["reconstructions"][0]["length"]))

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({name for name, _, _ in found}) == 6
    assert all(eos == pytest.approx(expected, abs=1e-6) and length == 3 for _, eos, length in found)


def test_too_many_clients_at_once(model, serve, monkeypatch):
    monkeypatch.setattr(demo_server, "MAX_REQUESTS", 1)
    server = serve(model)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        slow.sendall(post(len(PHOTO)) + PHOTO[:100])
        answer = (200, {})
        while answer[0] == 200:
            answer = ask_json(server, "GET", "/api/model")
        refused(answer, 503, "too many requests at once")
        # One that sends all of its picture before it listens gets this answer, too, and the page comes as ever.
        refused(ask_json(server, "POST", "/api/tokenize", bytes(16 << 20)), 503, "too many requests at once")
        assert ask(server, "GET", "/")[0] == 200
        slow.sendall(PHOTO[100:])
        assert b" 200 " in slow.recv(20)
    assert ask(server, "GET", "/api/model")[0] == 200


def test_slow_clients_do_not_hold_their_places(model, serve, monkeypatch, capfd):
    """A byte now and then is not enough: all of a request has one time limit."""
    monkeypatch.setattr(demo_server, "MAX_REQUESTS", 1)
    monkeypatch.setattr(connection, "DEADLINE", 0.6)
    server = serve(model)
    for head in (post(len(PHOTO)), b"GET / HTTP/1.1\r\nX-Long: "):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
            slow.sendall(head)
            start = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - start < connection.PATIENCE:
                    slow.sendall(b"a")
                    time.sleep(0.05)
        assert 0.5 < time.monotonic() - start < 5
    assert ask(server, "GET", "/api/model")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_too_many_connections(model, serve, monkeypatch):
    """Silent ones, which have not asked for anything yet."""
    monkeypatch.setattr(demo_server, "MAX_CONNECTIONS", 2)
    server = serve(model)
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(2)]
    with pytest.raises(ConnectionError):
        ask(server, "GET", "/")
    for one in silent:
        one.close()
    for _ in range(100):
        try:
            assert ask(server, "GET", "/")[0] == 200
            break
        except ConnectionError:
            time.sleep(0.02)
    else:
        raise AssertionError("their places are not free again")


def test_the_servers_own_failures_are_not_taken_for_the_clients(serve, capfd):
    class Failing(Gallery):
        def read(self, content: bytes, query: str = ""):
            raise OSError(28, "No space left on device")

    server = serve(Failing(micro_model()))
    refused(ask_json(server, "POST", "/api/tokenize", PHOTO), 500, "OSError: [Errno 28] No space left")
    assert "Traceback" in capfd.readouterr().err


def test_an_answer_that_is_no_json(serve):
    class Failing(Gallery):
        def reconstruct(self, name: str, lengths):
            return [Reconstruction(1, "", float("nan"))]

    server = serve(Failing(micro_model()))
    refused(ask_json(server, "GET", "/api/reconstructions/a/1"), 500, "the answer cannot be sent: ")


def test_closing(model):
    """From another thread it ends `serve`; before `serve`, and a second time, it does no harm."""
    server = DemoServer(Gallery(model))
    thread = threading.Thread(target=server.serve)
    thread.start()
    assert ask(server, "GET", "/")[0] == 200
    server.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/")
    server.close()
    server.serve()
    never = DemoServer(Gallery(model))
    never.close()
    never.serve()


def test_a_failing_model_is_a_clear_answer(serve, capfd):
    class Failing(Gallery):
        def read(self, content: bytes, query: str = ""):
            raise RuntimeError("out of memory")

    server = serve(Failing(micro_model()))
    refused(ask_json(server, "POST", "/api/tokenize", PHOTO), 500, "RuntimeError: out of memory")
    assert "Traceback" in capfd.readouterr().err


def test_ports(model, serve):
    server = serve(model)
    with pytest.raises(ValueError, match=f"port {server.port} is in use on 127.0.0.1; give another one"):
        DemoServer(Gallery(model), port=server.port)
    with pytest.raises(ValueError, match="port must be from 0 to 65535, got 65536"):
        DemoServer(Gallery(model), port=65536)
    with pytest.raises(ValueError, match=r"cannot serve on 192\.0\.2\.1, port 0: "):
        DemoServer(Gallery(model), host="192.0.2.1")
