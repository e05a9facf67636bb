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
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.proposals: dict[str, dict[str, Any]] = {}
        self.findings: list[dict[str, Any]] = []
        self.events: dict[str, dict[str, Any]] = {}
        self.scheduler: dict[str, Any] = {}
        """What the scheduler's status tells."""
        self.nodes: dict[str, dict[str, Any]] = {}
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
            case ["POST", "memories", "compare" | "rollback" as verb]:
                return self._time_route(verb, body)
            case [method, "snapshots" | "proposals" | "doctor" as what, *rest]:
                return self._lifecycle_route(what, method, rest, body)
            case [method, "scheduler" | "events" | "tasks" as what, *rest]:
                return self._scheduler_route(what, method, rest, params)
            case [method, "nodes" | "tenants", *rest]:
                return self._node_route(method, rest, body)
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

    def _time_route(self, verb: str, body: dict[str, Any]) -> httpx.Response:
        snapshot = self.snapshots.get(body.get("snapshot", ""), {})
        time = snapshot.get("at") or body.get("since") or body.get("to")
        shown = [c for c in self.cubes.values() if _fits(c, snapshot or body)]
        if verb == "compare":
            start, limit = int(body.get("cursor", 0)), body["limit"]
            results = [
                {"id": c["id"], "change": "added", "after": c, "state_after": c["state"]}
                for c in shown[start : start + limit]
            ]
            cursor = str(start + limit) if start + limit < len(shown) else None
            told = {"since": time, "until": body.get("until") or _TIME, "results": results}
            return httpx.Response(200, json={**told, "next_cursor": cursor})
        for cube in shown:
            cube["state"] = "archived"
        out = [{"id": cube["id"], "version": cube["version"]} for cube in shown]
        told = {"to": time, "changed": [], "out_of_search": out, "cannot_restore": []}
        return httpx.Response(200, json={**told, "pending": 0})

    def _lifecycle_route(
        self, what: str, method: str, rest: list[str], body: dict[str, Any]
    ) -> httpx.Response:
        match [what, method, *rest]:
            case ["snapshots", "POST"]:
                id = str(UUID(int=len(self.snapshots) + 1))
                self.snapshots[body["name"]] = {"id": id, "at": _TIME, **body}
                return httpx.Response(201, json=self.snapshots[body["name"]])
            case ["snapshots", "GET"]:
                return httpx.Response(200, json={"snapshots": list(self.snapshots.values())})
            case ["snapshots", "DELETE", id]:
                for name in [n for n, one in self.snapshots.items() if one["id"] == id]:
                    del self.snapshots[name]
                    return httpx.Response(200, json={"id": id, "deleted": True})
            case ["proposals", "GET"]:
                return httpx.Response(200, json={"proposals": list(self.proposals.values())})
            case ["proposals", "POST", "find"]:
                cubes = [c for c in self.cubes.values() if _fits(c, body)][:2]
                id = str(UUID(int=len(self.proposals) + 1))
                made = {"id": id, "kind": "duplicate", "state": "open", "text": cubes[0]["text"]}
                made["cubes"] = [{n: c[n] for n in ("id", "version", "text")} for c in cubes]
                self.proposals[id] = {**made, "why": {"cosine": 0.97}}
                return httpx.Response(200, json={"proposals": [self.proposals[id]]})
            case ["proposals", "POST", id, "apply" | "dismiss" as verb] if id in self.proposals:
                done = self.proposals[id]
                done["state"] = "applied" if verb == "apply" else "dismissed"
                cube = {"id": "9", "state": "generated", "version": 1, "text": done["text"]}
                told = done if verb == "dismiss" else {"proposal": done, "cube": cube}
                return httpx.Response(200, json=told)
            case ["doctor", "GET"] | ["doctor", "POST", "repair"]:
                found = [{**one, "repaired": 0} for one in self.findings]
                if method == "POST":
                    found = [{**one, "repaired": one["count"]} for one in found]
                    self.findings.clear()
                sound = method == "POST" or not found
                told = {"sound": sound, "looked_at": {"index": len(self.cubes)}, "findings": found}
                return httpx.Response(200, json={**told, "next_cursor": None})
        return problem(404, "not_found", f"no {what} {rest}")

    def event(self, type: str, state: str, **more: Any) -> str:
        """The id of a new action or task."""
        id = str(UUID(int=len(self.events) + 1))
        made = {"id": id, "type": type, "kind": "copy", "state": state, "tenant": "default"}
        more["ended"] = state in ("done", "failed", "dead")
        self.events[id] = {**made, "created_at": _TIME, "updated_at": _TIME, **more}
        return id

    def node(self, name: str, *, num_tenants: int = 0, **more: Any) -> None:
        """A node that is up."""
        made = {"name": name, "state": "up", "since": _TIME, "labels": {}, "is_head": False}
        self.nodes[name] = {**made, "shards": [], "home_of": [], "num_tenants": num_tenants, **more}

    def _node_route(self, method: str, rest: list[str], body: dict[str, Any]) -> httpx.Response:
        """Each look at a node that drains finds one tenant fewer on it."""
        if not rest:
            return httpx.Response(200, json={"nodes": list(self.nodes.values())})
        node = self.nodes.get(rest[0])
        match [method, *rest[1:]]:
            case ["POST", "move"]:
                if body["to"] not in self.nodes:
                    return problem(404, "not_found", f"no node {body['to']!r}")
                id = self.event("task", "waiting", kind="move_tenant", tenant=rest[0])
                return httpx.Response(202, json=self.events[id])
            case _ if node is None:
                return problem(404, "not_found", f"no node {rest[0]!r}")
            case ["GET"]:
                if node["state"] == "draining":
                    node["num_tenants"] = max(node["num_tenants"] - 1, 0)
                    node["state"] = "draining" if node["num_tenants"] else "drained"
                return httpx.Response(200, json=node)
            case ["POST", "drain" | "undrain" as verb]:
                node["state"] = "draining" if verb == "drain" else "up"
                return httpx.Response(200, json=node)
            case ["DELETE"] if node["state"] == "down":
                del self.nodes[rest[0]]
                return httpx.Response(200, json={"name": rest[0], "forgotten": True})
        return problem(409, "conflict", f"node {rest[0]!r} is up; stop its Ray first")

    def _scheduler_route(
        self, what: str, method: str, rest: list[str], params: dict[str, str]
    ) -> httpx.Response:
        match [what, method, *rest]:
            case ["scheduler", "GET"]:
                return httpx.Response(200, json=self.scheduler)
            case ["scheduler", "POST", "plan"]:
                dry_run = params["dry_run"] == "true"
                move = {"action": "copy", "tenant": "default", "cube": "1", "policy": "promotion"}
                move |= {"source": None, "target": "node/engine-0", "reason": "worth it"}
                told = {"dry_run": dry_run, "num_actions": 1, "num_refused": 1, "planned": {}}
                reason = "the round is full"
                told["refused"] = [{"policy": "promotion", "reason": reason, "count": 1}]
                told["actions"] = [move] if dry_run else []
                told["refusals"] = [{**move, "refused": reason}] if dry_run else []
                return httpx.Response(200, json=told)
            case ["scheduler", "GET", "journal"] | ["tasks", "GET"]:
                type = "task" if what == "tasks" else "action"
                names = ("state", "tenant", "cube")
                found = [
                    one
                    for one in reversed(self.events.values())
                    if one["type"] == type
                    and all(params.get(name) in (None, one.get(name)) for name in names)
                ]
                return httpx.Response(200, json={"events": found, "next": None})
            case ["events", "GET", id, *_] if id in self.events:
                return httpx.Response(200, json=self.events[id])
            case ["tasks", "POST", id, "retry"] if id in self.events:
                self.events[id] |= {"state": "waiting", "ended": False}
                return httpx.Response(200, json=self.events[id])
            case ["tasks", "POST", id, "accept"] if id in self.events:
                job = {"id": f"job-of-{id}", "kind": "consolidate", "state": "queued"}
                return httpx.Response(202, json={**job, "created_at": _TIME})
        return problem(404, "not_found", f"no {what} {rest}")

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
    headers = {"content-type": "application/problem+json"}
    return httpx.Response(status, headers=headers, content=json.dumps(content))


def _failure(failure: int | httpx.Response | Exception) -> httpx.Response:
    if isinstance(failure, Exception):
        raise failure
    return problem(failure, "unavailable", "busy") if isinstance(failure, int) else failure


def _fits(cube: dict[str, Any], wanted: dict[str, Any]) -> bool:
    names = ("user_id", "agent_id", "run_id", "kind", "state")
    return all(wanted.get(name) in (None, cube[name]) for name in names)
