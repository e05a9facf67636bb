"""A small server of the HTTP API in memory, for tests of what talks to it.

It keeps to the API's forms, not to its depth: search counts shared words, there is one tenant, and
composites have no lineage. ``FakeApi.transport`` goes into either client.
"""

import json
from collections import deque
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import httpx

KEY = "mk_test"
_TIME = "2024-05-01T12:00:00Z"


class FakeApi:
    """``failures`` are given out first: a status, a response, or an exception to raise.

    ``after`` holds failures that come after the request was carried out: its outcome is unknown.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.failures: deque[int | httpx.Response | Exception] = deque()
        self.after: deque[int | httpx.Response | Exception] = deque()
        self.cubes: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self._answers: dict[str, tuple[bytes, httpx.Response]] = {}
        self.transport = httpx.MockTransport(self.answer)

    def answer(self, request: httpx.Request) -> httpx.Response:
        """The response to one request."""
        self.requests.append(request)
        if self.failures:
            return _failure(self.failures.popleft())
        response = self._keyed(request)
        return _failure(self.after.popleft()) if self.after else response

    def _keyed(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("idempotency-key")
        if key in self._answers:
            body, response = self._answers[key]
            if body != request.content:
                return problem(422, "idempotency_mismatch", f"key {key!r} was used before")
            return response
        response = self._route(request)
        if key and response.is_success:
            self._answers[key] = request.content, response
        return response

    def _route(self, request: httpx.Request) -> httpx.Response:
        path = [unquote(part) for part in request.url.raw_path.decode().split("?")[0].split("/")]
        if path[1:] in (["healthz"], ["readyz"]):
            return httpx.Response(200, json={"status": "ok"})
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return problem(401, "unauthenticated", "no valid API key")
        body = json.loads(request.content) if request.content else {}
        params = dict(request.url.params)
        match [request.method, *path[2:]]:
            case ["POST", "memories"]:
                return httpx.Response(201, json=self._add(body))
            case ["POST", "memories", "batch"]:
                return httpx.Response(201, json={"results": [self._add(i) for i in body["items"]]})
            case ["POST", "memories", "search"]:
                return httpx.Response(
                    200, json={"results": self._search(body), "took_ms": {"total": 1}}
                )
            case ["GET", "memories"]:
                return self._page(params)
            case ["DELETE", "memories"]:
                doomed = [c["id"] for c in self.cubes.values() if _fits(c, params)]
                for id in doomed:
                    del self.cubes[id]
                return httpx.Response(200, json={"deleted": len(doomed)})
            case ["POST", "context"]:
                hits = self._search({"query": body.get("query", ""), **body})
                text = "\n".join(hit["text"] for hit in hits)
                ids = [hit["id"] for hit in hits]
                told = {"context": text, "ids": ids, "num_tokens": len(text.split())}
                return httpx.Response(200, json={**told, "budget": body["token_budget"]})
            case ["GET", "status"]:
                return httpx.Response(
                    200, json={"version": "0.1.0", "cubes": {"generated": len(self.cubes)}}
                )
            case [method, "keys", *rest]:
                return self._key_route(method, rest, body)
            case [method, "memories" | "cubes", id, *rest]:
                return self._cube_route(method, id, rest, body)
        return problem(404, "not_found", f"no route {request.url.path}")

    def _add(self, item: dict[str, Any]) -> dict[str, Any]:
        messages = item.get("messages") or [{"content": item["text"], "role": None}]
        return {"results": [self._store(item, message) for message in messages]}

    def _store(self, item: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        cube = {
            "state": "generated",
            "shape": "leaf",
            "version": 1,
            "text": message["content"],
            "role": message["role"],
            "speaker": message.get("name"),
            "event_time": message.get("time"),
            "created_at": _TIME,
            "kind": item.get("kind") or "episode",
            "metadata": item.get("metadata") or {},
            "tags": item.get("tags") or [],
            "sources": [{"ref": message.get("id"), "text": message["content"]}],
            "indexed": True,
            **{name: item.get(name) for name in ("user_id", "agent_id", "run_id")},
        }
        same = ("text", "role", "speaker", "user_id", "agent_id", "run_id")
        for known in self.cubes.values():
            if all(known[name] == cube[name] for name in same):
                return {**known, "event": "repeated"}
        cube["id"] = str(UUID(int=len(self.cubes) + 1))
        self.cubes[cube["id"]] = cube
        return {**cube, "event": "added"}

    def _search(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        words = set(body["query"].lower().split())
        scored = [
            {**cube, "score": float(len(words & set(cube["text"].lower().split())))}
            for cube in self.cubes.values()
            if _fits(cube, body)
        ]
        scored.sort(key=lambda hit: (-hit["score"], hit["id"]))
        return scored[: body.get("top_k", 10)]

    def _page(self, params: dict[str, str]) -> httpx.Response:
        fitting = [cube for cube in self.cubes.values() if _fits(cube, params)][::-1]
        start, limit = int(params.get("cursor", 0)), int(params.get("limit", 50))
        end = start + limit
        cursor = str(end) if end < len(fitting) else None
        return httpx.Response(200, json={"results": fitting[start:end], "next_cursor": cursor})

    def _key_route(self, method: str, rest: list[str], body: dict[str, Any]) -> httpx.Response:
        match [method, *rest]:
            case ["POST"]:
                id = str(UUID(int=len(self.keys) + 1))
                self.keys[id] = {"id": id, "tenant": "default", "created_at": _TIME, **body}
                return httpx.Response(201, json={**self.keys[id], "key": "mk_secret"})
            case ["GET"]:
                return httpx.Response(200, json={"keys": list(self.keys.values())})
            case ["DELETE", id] if self.keys.pop(id, None):
                return httpx.Response(200, json={"id": id, "revoked": True})
        return problem(404, "not_found", "no such key")

    def _cube_route(
        self, method: str, id: str, rest: list[str], body: dict[str, Any]
    ) -> httpx.Response:
        cube = self.cubes.get(id)
        if cube is None:
            return problem(404, "not_found", f"no cube {id!r}")
        match [method, *rest]:
            case ["GET"]:
                return httpx.Response(200, json=cube)
            case ["DELETE"]:
                del self.cubes[id]
                return httpx.Response(200, json={"id": id, "deleted": True})
            case ["PUT"]:
                expected = body.pop("expected_version", cube["version"])
                if expected != cube["version"]:
                    return problem(409, "version_mismatch", "changed", current=cube["version"])
                cube.update(body, version=cube["version"] + 1)
                return httpx.Response(200, json=cube)
            case ["GET", "history" | "versions"]:
                return httpx.Response(200, json={"versions": [cube]})
            case ["POST", "migrate"]:
                tokens = len(cube["text"].split()) if body["tier"] == "activation" else 0
                told = {"tokens": tokens, "built_tokens": tokens, "size_bytes": 9 * tokens}
                told |= {"id": id, "version": cube["version"], "cubes": 1, "dropped_bytes": 0}
                place = {"tier": "activation", "medium": "device", "location": "node/engine-0"}
                place |= {"version": cube["version"], "size_bytes": 9 * tokens, "epoch": 0}
                told["residency"] = [place] if tokens else []
                return httpx.Response(200, json={**told, "tier": body["tier"]})
            case ["POST", "freeze" | "unfreeze" as verb]:
                cube["frozen"] = verb == "freeze"
                return httpx.Response(200, json=cube)
        return problem(404, "not_found", "no such route")


def problem(status: int, code: str, detail: str, **more: Any) -> httpx.Response:
    """An error response in the API's form."""
    body = {"type": "about:blank", "title": code, "status": status, "code": code}
    content = {**body, "detail": detail, "request_id": "req-1", **more}
    return httpx.Response(status, json=content)


def _failure(failure: int | httpx.Response | Exception) -> httpx.Response:
    if isinstance(failure, Exception):
        raise failure
    return problem(failure, "unavailable", "busy") if isinstance(failure, int) else failure


def _fits(cube: dict[str, Any], wanted: dict[str, Any]) -> bool:
    names = ("user_id", "agent_id", "run_id", "kind", "state")
    return all(wanted.get(name) in (None, cube[name]) for name in names)
