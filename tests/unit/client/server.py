"""A real HTTP server that gives the answers of a script, one per request, and remembers what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What to say. status None: read the request, then hang up without a word."""

    status: int | None
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


HANG_UP = Answer(None)


@dataclass(frozen=True)
class Asked:
    """One request as it arrived. Header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Script:
    """The answers still to give, and the requests so far. The last answer is given again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self.url = ""

    @property
    def keys(self) -> list[str | None]:
        return [one.headers.get("idempotency-key") for one in self.asked]


@contextmanager
def serving(*answers: Answer) -> Iterator[Script]:
    script = Script(*answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            content = self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.asked.append(Asked(self.command, self.path, headers, json.loads(content) if content else None))
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if answer.status is None:
                self.close_connection = True
                return
            text = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
