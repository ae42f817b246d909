"""A real web server in threads, for tests: each path is a function that says what is sent."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# how long a server waits for its client in tests that are about to fail
PATIENCE = 30.0


class Request(BaseHTTPRequestHandler):
    """One request, as a route sees it; what it writes to `wfile` goes out as it is."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def handle_any(self) -> None:
        assert isinstance(self.server, WebServer)
        self.server.seen.append((self.command, self.path, dict(self.headers.items())))
        self.close_connection = True
        with contextlib.suppress(OSError):
            route = self.server.routes.get(self.path.partition("?")[0])
            if route is None:
                self.answer(b"no such route", 404)
            else:
                route(self)

    do_GET = do_POST = handle_any  # noqa: N815

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.head(status, Content_Length=str(len(body)), **headers)
        self.wfile.write(body)

    def head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self) -> bytes:
        """The whole body of the request, of either framing."""
        return b"".join(self.parts())

    def parts(self) -> Iterator[bytes]:
        """A chunked body chunk by chunk, any other at once."""
        if self.headers["Transfer-Encoding"] != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def is_closed(self) -> bool:
        """Waits for the client to close the connection."""
        try:
            return not self.connection.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True

    def log_message(self, *_: object) -> None:
        """The standard error of tests is for failures."""


class WebServer(ThreadingHTTPServer):
    """`routes` by path; `seen` holds method, path and headers of every request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.tls = tls
        self.routes: dict[str, Callable[[Request], object]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def place(self) -> str:
        """What to grant."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}{path}"

    def finish_request(self, request: object, client_address: object) -> None:
        assert not isinstance(request, tuple)
        with contextlib.suppress(OSError):  # a client that refuses the certificate
            if self.tls is not None:
                request = self.tls.wrap_socket(request, server_side=True)  # type: ignore[arg-type]
            super().finish_request(request, client_address)  # type: ignore[arg-type]

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
