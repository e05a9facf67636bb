"""The blocking client. Its methods are the functions of ``calls``, sent."""

import functools
import inspect
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, get_args

import httpx

from memcube.client import calls
from memcube.client.address import Address, find_address
from memcube.client.retry import Answer, Call, RetryPolicy, Tries
from memcube.client.types import Cube

P = ParamSpec("P")
T = TypeVar("T")


class Sender(Protocol):
    """What can send a call."""

    def send(self, call: Call[T]) -> T: ...


def sending(build: Callable[P, Call[T]]) -> Callable[Concatenate[Sender, P], T]:
    """The method that makes a call and sends it."""

    @functools.wraps(build)
    def method(self: Sender, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return as_method(method, build)


def as_method(method: Any, build: Callable[..., Any]) -> Any:
    """Give a method the signature of the function behind it, for help() and editors."""
    del method.__wrapped__
    signature = inspect.signature(build)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    (result,) = get_args(signature.return_annotation)
    method.__signature__ = signature.replace(
        parameters=[itself, *signature.parameters.values()], return_annotation=result
    )
    return method


class MemCubeClient:
    """Talks to one server with one key; safe to share between threads.

    Args:
        url, api_key: where and who; see ``find_address`` for what happens without them.
        timeout_s: longest silence of the server in one try. The whole call ends after
            ``retry.deadline_s``, give or take one such silence.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        data_dir: str | Path | None = None,
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.address = find_address(url, api_key, data_dir=data_dir)
        self.cubes = Cubes(self)
        self.keys = Keys(self)
        self.jobs = Jobs(self)
        self.adapters = Adapters(self)
        self.snapshots = Snapshots(self)
        self.proposals = Proposals(self)
        self.scheduler = Scheduler(self)
        self.nodes = Nodes(self)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._http = httpx.Client(
            base_url=self.address.url,
            headers=auth(self.address),
            trust_env=not self.address.is_local,  # a proxy can't reach this machine's loopback
            transport=transport,
        )

    add = sending(calls.add)
    add_batch = sending(calls.add_batch)
    search = sending(calls.search)
    get = sending(calls.get)
    list = sending(calls.list_page)
    update = sending(calls.update)
    delete = sending(calls.delete)
    delete_all = sending(calls.delete_all)
    history = sending(calls.history)
    context = sending(calls.context)
    compare = sending(calls.compare)
    rollback = sending(calls.rollback_scope)
    doctor = sending(calls.doctor)
    status = sending(calls.status)
    health = sending(calls.health)
    ready = sending(calls.ready)

    def iterate(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        state: str | None = None,
        tag: str | None = None,
        page_size: int = 200,
    ) -> Iterator[Cube]:
        """All cubes that fit, newest first, fetched page by page."""
        cursor: str | None = None
        while True:
            page = self.list(
                user_id=user_id,
                agent_id=agent_id,
                run_id=run_id,
                kind=kind,
                state=state,
                tag=tag,
                limit=page_size,
                cursor=cursor,
            )
            yield from page.results
            cursor = page.next_cursor
            if cursor is None:
                return

    def send(self, call: Call[T]) -> T:
        """Carry out a call, with its retries."""
        started = time.monotonic()
        tries = Tries(call, self._retry, self.address.url, now=started, draw=random.random)
        while True:
            timeout_s = min(self._timeout_s, tries.left_s(time.monotonic()))
            request = to_request(self._http, call, timeout_s)
            try:
                response = self._http.send(request)
            except httpx.RequestError as failure:
                outcome = tries.failed(failure, now=time.monotonic())
            else:
                outcome = tries.answered(response, now=time.monotonic())
                if isinstance(outcome, Answer):
                    return outcome.value
            time.sleep(outcome.wait_s)

    def close(self) -> None:
        """Close the connections. The client can't be used after it."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address.url!r})"


class Cubes:
    """``client.cubes``: composites, versions and lineage."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    create = sending(calls.create_composite)
    get = sending(calls.get_cube)
    members = sending(calls.members)
    set_members = sending(calls.set_members)
    compose = sending(calls.compose)
    fuse = sending(calls.fuse)
    versions = sending(calls.versions)
    migrate = sending(calls.migrate)
    rollback = sending(calls.rollback)
    freeze = sending(calls.freeze)
    unfreeze = sending(calls.unfreeze)
    archive = sending(calls.archive)
    restore = sending(calls.restore)
    lineage = sending(calls.lineage)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Jobs:
    """``client.jobs``: long work."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    consolidate = sending(calls.consolidate)
    list = sending(calls.list_jobs)
    get = sending(calls.get_job)
    logs = sending(calls.job_logs)
    cancel = sending(calls.cancel_job)
    resume = sending(calls.resume_job)
    report = sending(calls.job_report)
    page = sending(calls.job_page)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Adapters:
    """``client.adapters``: versions of adapters, and which serve."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_adapters)
    activate = sending(calls.activate_adapter)
    rollback = sending(calls.rollback_adapter)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Keys:
    """``client.keys``: the tenant's API keys. Needs an admin key."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    create = sending(calls.create_key)
    list = sending(calls.list_keys)
    revoke = sending(calls.revoke_key)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Snapshots:
    """``client.snapshots``: names for a scope at a time."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    create = sending(calls.create_snapshot)
    list = sending(calls.list_snapshots)
    delete = sending(calls.delete_snapshot)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Scheduler:
    """``client.scheduler``: what it plans, does and did, and its queue."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    status = sending(calls.scheduler_status)
    plan = sending(calls.scheduler_plan)
    journal = sending(calls.journal)
    tasks = sending(calls.list_tasks)
    event = sending(calls.get_event)
    wait = sending(calls.wait_for_event)
    retry = sending(calls.retry_task)
    accept = sending(calls.accept_task)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Nodes:
    """``client.nodes``: machines, and which tenants go where. Needs an operator's key."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_nodes)
    get = sending(calls.get_node)
    drain = sending(calls.drain_node)
    undrain = sending(calls.undrain_node)
    forget = sending(calls.forget_node)
    move_tenant = sending(calls.move_tenant)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


class Proposals:
    """``client.proposals``: memories that could be one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_proposals)
    find = sending(calls.find_proposals)
    apply = sending(calls.apply_proposal)
    dismiss = sending(calls.dismiss_proposal)

    def send(self, call: Call[T]) -> T:
        return self._sender.send(call)


def auth(address: Address) -> dict[str, str]:
    """The headers of every request."""
    headers = {"User-Agent": "memcube-client", "Accept": "application/json"}
    if address.api_key is not None:
        headers["Authorization"] = f"Bearer {address.api_key}"
    return headers


def to_request(
    http: httpx.Client | httpx.AsyncClient, call: Call[Any], timeout_s: float
) -> httpx.Request:
    """One try of a call as a request."""
    headers = dict(call.headers or {})
    if call.body is not None:
        headers["Content-Type"] = "application/json"
    return http.build_request(
        call.method,
        call.path,
        params=call.params,
        content=call.body,
        headers=headers,
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0)),
    )
