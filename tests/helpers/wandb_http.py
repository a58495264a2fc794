"""The HTTP side of the W&B backend of wandb_server.py: it checks the API key and produces the faults."""

import contextlib
import json
import re
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.helpers.wandb_runs import as_base64

if TYPE_CHECKING:
    from tests.helpers.wandb_server import WandbServer

API_KEY = "canary00".ljust(40, "0")  # distinctive, so that a test can look for it in every file and command line


def operation(request: dict[str, Any]) -> str:
    """Return the operation name of a GraphQL request."""
    named = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
    return request.get("operationName") or (named[1] if named else "")


class Listener(ThreadingHTTPServer):
    """A server that listens from its construction to end(), and keeps its open connections."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server: "WandbServer", port: int) -> None:
        self.server = server
        self.ending = threading.Event()
        self.open: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="wandb_server", daemon=True)
        self.thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.open[threading.current_thread()] = request
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self.open[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections, which tests provoke; keep any other error for the test to see."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            self.server.errors.append("".join(traceback.format_exception(error)))

    def end(self) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()
        self.thread.join()
        for thread, connection in list(self.open.items()):
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()


class RefusedError(Exception):
    """Answer a request with this HTTP status and message: the server refuses it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """Handles one request a connection (HTTP/1.0), so that a server that dies leaves none open."""

    timeout = 60  # seconds for a client that connects and says nothing
    server: Listener

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        backend, ending = self.server.server, self.server.ending
        kind, name = self._kind(body)
        backend.requests.append((kind, name))
        ending.wait(backend.delay_s.get(kind, 0))
        while backend.hang and not ending.is_set():
            ending.wait(0.02)
            if not backend.hang:
                return
        if ending.is_set():
            return
        status, answer = self._answer(kind, body)
        if kind not in backend.lose_answers:
            sent = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    def _kind(self, body: bytes) -> tuple[str, str]:
        path = unquote(urlsplit(self.path).path)
        if path == "/graphql":
            return "graphql", operation(json.loads(body))
        if path.endswith("/file_stream"):
            return "file_stream", path.split("/")[4]
        return ("upload", path.removeprefix("/upload/")) if path.startswith("/upload/") else ("other", path)

    def _answer(self, kind: str, body: bytes) -> tuple[int, Any]:
        backend = self.server.server
        if kind in backend.fail:
            return backend.fail[kind], {"errors": [{"message": "the test wants this to fail"}]}
        key = "Basic " + as_base64(f"api:{API_KEY}".encode())
        if kind in ("graphql", "file_stream") and self.headers.get("Authorization") != key:  # uploads have signed links
            return 401, {"errors": [{"message": "the key is not ours"}]}
        try:
            answer = backend.handle(self.command, self.path, body)
        except RefusedError as error:
            return error.status, {"errors": [{"message": str(error)}]}
        if answer is None:
            return (400 if kind == "graphql" else 404), {"errors": [{"message": "we have no answer to this"}]}
        return 200, {"data": answer} if kind == "graphql" else answer
