"""A server that speaks OpenAI's chat API on loopback, with answers that the test writes."""

import json
import threading
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

MODEL = "fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What the server was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class FakeLlm:
    """Real HTTP on a free port, in a thread. Use it as a context manager.

    An answer is the content of a completion (a string, or what becomes JSON), an HTTP status, or
    bytes that are sent as the whole body. Answers are given out in order; the last one stays.
    """

    def __init__(self, *answers: str | dict[str, Any] | int | bytes) -> None:
        self.answers = deque(answers or ({"facts": []},))
        self.requests: list[ChatRequest] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def base_url(self) -> str:
        """For ``reader.llm.base_url``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: ChatRequest) -> tuple[int, bytes]:
        """Status and body for one request."""
        with self._lock:
            self.requests.append(request)
            answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, int):
            return answer, json.dumps({"error": {"message": "as the test asked"}}).encode()
        if isinstance(answer, bytes):
            return 200, answer
        content = answer if isinstance(answer, str) else json.dumps(answer)
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion = {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
        return 200, json.dumps(completion).encode()


def _handler(llm: FakeLlm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            if self.path == "/v1/chat/completions":
                request = ChatRequest(path=self.path, headers=headers, body=body)
                status, answer = llm.answer(request)
            else:
                status, answer = 404, b"{}"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Tests read ``requests`` instead."""

    return Handler
