"""What ``S3Store`` makes of a server that honours conditions, and of one that fails.

The server here is a double of a few lines, since the real one of the tests ignores conditions and
fails by being killed only. ``test_s3_store`` checks the same calls on that one.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from memcube.errors import Conflict, DeadlineExceeded, NotFound, StorageFull, Unavailable
from memcube.objects.s3 import S3Settings, S3Store

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>scripted</Message></Error>"


class Double(ThreadingHTTPServer):
    """Objects in a dict, and a script: what befalls the next requests, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.script: list[str] = []
        self.requests: list[str] = []
        self.takes_ranges = True
        self.released = threading.Event()

    def settings(self, **changes) -> S3Settings:
        given = {
            "endpoint": f"127.0.0.1:{self.server_port}",
            "bucket": "bucket",
            "access_key": "key",
            "secret_key": "secret-secret",
            "secure": False,
            "prefix": "",
            "read_timeout_s": 5.0,
        }
        return S3Settings(**(given | changes))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Double

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        name = self._name()
        befalls = self._befalls()
        if befalls == "lost answer of another's":
            self.server.objects[name] = b"another's"
        elif not befalls or befalls == "lost answer":
            if self.headers.get("if-none-match") == "*" and name in self.server.objects:
                return self._error(412, "PreconditionFailed")
            self.server.objects[name] = body
        if befalls.startswith("lost answer"):
            self.close_connection = True
            return None
        return self._fail(befalls) if befalls else self._answer(200)

    def do_GET(self) -> None:
        befalls, data = self._befalls(), self.server.objects.get(self._name())
        if befalls not in ("", "cut"):
            return self._fail(befalls)
        if data is None:
            return self._error(404, "NoSuchKey")
        wanted = self.headers.get("range")
        if wanted and self.server.takes_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            return self._answer(206, data[int(first) : int(last) + 1])
        if befalls == "cut":
            self.close_connection = True
            return self._answer(200, data, sent=len(data) // 2)
        return self._answer(200, data)

    def do_DELETE(self) -> None:
        self._befalls()
        self.server.objects.pop(self._name(), None)
        self._answer(204)

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/bucket/")

    def _befalls(self) -> str:
        self.server.requests.append(self.command)
        return self.server.script.pop(0) if self.server.script else ""

    def _fail(self, befalls: str) -> None:
        if befalls == "stall":
            self.server.released.wait(10)
            self.close_connection = True
        elif befalls == "502 of a proxy":
            self._answer(502, b"<html>Bad gateway</html>", kind="text/html")
        else:
            status, code = befalls.split()
            self._error(int(status), code)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, ERROR.format(code).encode(), kind="application/xml")

    def _answer(
        self, status: int, body: bytes = b"", *, kind: str = "binary/x", sent: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
async def store(double: Double):
    store = await S3Store.open(double.settings())
    double.requests.clear()
    yield store
    await store.close()


async def test_a_server_that_honours_conditions_is_found_out(store, double):
    assert store.atomic_create is True
    assert double.objects == {}
    await store.put("x", b"1", if_absent=True)
    with pytest.raises(Conflict):
        await store.put("x", b"2", if_absent=True)
    assert double.objects == {"x": b"1"}


@pytest.mark.parametrize(
    "failure", ["503 SlowDown", "500 InternalError", "502 of a proxy", "lost answer"]
)
async def test_what_may_pass_is_tried_again(store, double, failure):
    double.script = [failure, failure]
    await store.put("x", b"1")
    assert double.objects == {"x": b"1"}
    assert len(double.requests) == 3


@pytest.mark.parametrize("failure", ["503 SlowDown", "502 of a proxy"])
async def test_what_does_not_pass_is_unavailable_after_the_stated_attempts(double, failure):
    store = await S3Store.open(double.settings(attempts=2))
    double.requests.clear()
    double.script = [failure] * 9
    with pytest.raises(Unavailable, match="127"):
        await store.get("x")
    assert len(double.requests) == 2


async def test_a_refusal_is_told_at_once(store, double):
    double.script = ["403 AccessDenied"]
    with pytest.raises(Unavailable, match="AccessDenied"):
        await store.put("x", b"1")
    assert len(double.requests) == 1


async def test_a_full_server_is_told_as_such(store, double):
    double.script = ["507 XMinioStorageFull"]
    with pytest.raises(StorageFull):
        await store.put("x", b"1")


async def test_a_server_that_stalls_misses_the_deadline(double):
    store = await S3Store.open(double.settings(attempts=1, read_timeout_s=0.2))
    double.script = ["stall"]
    with pytest.raises(DeadlineExceeded):
        await store.get("x")


async def test_no_attempt_begins_after_the_deadline(double):
    store = await S3Store.open(double.settings(attempts=9, deadline_s=0.05))
    double.requests.clear()
    double.script = ["503 SlowDown"] * 9
    with pytest.raises(Unavailable):
        await store.get("x")
    assert len(double.requests) == 1


async def test_an_answer_that_is_cut_short_is_not_taken_for_the_object(store, double):
    double.objects["x"] = b"whole " * 1000
    double.script = ["cut", "cut"]
    assert await store.get("x") == b"whole " * 1000


async def test_a_server_without_ranges_is_cut_here(store, double):
    double.objects["x"] = bytes(range(100))
    double.takes_ranges = False
    assert await store.get_range("x", 10, 5) == bytes(range(10, 15))
    assert await store.get_range("x", 0, 5) == bytes(range(5))


async def test_a_create_whose_answer_was_lost_is_known_by_its_bytes(store, double):
    double.script = ["lost answer"]
    await store.put("x", b"ours", if_absent=True)
    assert double.objects == {"x": b"ours"}


async def test_after_a_lost_answer_anothers_object_is_a_conflict(store, double):
    double.script = ["lost answer of another's"]
    with pytest.raises(Conflict):
        await store.put("x", b"ours", if_absent=True)
    assert double.objects == {"x": b"another's"}


async def test_where_nothing_listens_it_is_unavailable():
    settings = S3Settings(
        endpoint="127.0.0.1:1", bucket="b", access_key="a", secret_key="s", secure=False, attempts=1
    )
    with pytest.raises(Unavailable):
        await S3Store.open(settings)


async def test_a_missing_object_is_not_tried_again(store, double):
    with pytest.raises(NotFound):
        await store.get("x")
    assert len(double.requests) == 1
