"""The asyncio client. Its methods are the functions of ``calls``, sent."""

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, Self, TypeVar

import httpx

from memcube.client import calls
from memcube.client.address import find_address
from memcube.client.retry import Answer, Call, RetryPolicy, Tries
from memcube.client.sync import as_method, auth, to_request
from memcube.client.types import Cube

P = ParamSpec("P")
T = TypeVar("T")


class Sender(Protocol):
    """What can send a call."""

    async def send(self, call: Call[T]) -> T: ...


def sending(build: Callable[P, Call[T]]) -> Callable[Concatenate[Sender, P], Awaitable[T]]:
    """The coroutine method that makes a call and sends it."""

    @functools.wraps(build)
    async def method(self: Sender, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return as_method(method, build)


class AsyncMemCubeClient:
    """Talks to one server with one key; belongs to one event loop. See ``MemCubeClient``."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        data_dir: str | Path | None = None,
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address = find_address(url, api_key, data_dir=data_dir)
        self.cubes = AsyncCubes(self)
        self.keys = AsyncKeys(self)
        self.jobs = AsyncJobs(self)
        self.adapters = AsyncAdapters(self)
        self.snapshots = AsyncSnapshots(self)
        self.proposals = AsyncProposals(self)
        self.scheduler = AsyncScheduler(self)
        self.nodes = AsyncNodes(self)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._http = httpx.AsyncClient(
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

    async def iterate(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        state: str | None = None,
        tag: str | None = None,
        page_size: int = 200,
    ) -> AsyncIterator[Cube]:
        """All cubes that fit, newest first, fetched page by page."""
        cursor: str | None = None
        while True:
            page = await self.list(
                user_id=user_id,
                agent_id=agent_id,
                run_id=run_id,
                kind=kind,
                state=state,
                tag=tag,
                limit=page_size,
                cursor=cursor,
            )
            for cube in page.results:
                yield cube
            cursor = page.next_cursor
            if cursor is None:
                return

    async def send(self, call: Call[T]) -> T:
        """Carry out a call, with its retries. No try outlives the policy's deadline."""
        started = time.monotonic()
        tries = Tries(call, self._retry, self.address.url, now=started, draw=random.random)
        while True:
            left_s = tries.left_s(time.monotonic())
            request = to_request(self._http, call, min(self._timeout_s, left_s))
            try:
                async with asyncio.timeout(left_s):
                    response = await self._http.send(request)
            except TimeoutError:
                late = httpx.ReadTimeout("deadline", request=request)
                outcome = tries.failed(late, now=time.monotonic())
            except httpx.RequestError as failure:
                outcome = tries.failed(failure, now=time.monotonic())
            else:
                outcome = tries.answered(response, now=time.monotonic())
                if isinstance(outcome, Answer):
                    return outcome.value
            await asyncio.sleep(outcome.wait_s)

    async def aclose(self) -> None:
        """Close the connections. The client can't be used after it."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address.url!r})"


class AsyncCubes:
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

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncJobs:
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

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncAdapters:
    """``client.adapters``: versions of adapters, and which serve."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_adapters)
    activate = sending(calls.activate_adapter)
    rollback = sending(calls.rollback_adapter)

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncKeys:
    """``client.keys``: the tenant's API keys. Needs an admin key."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    create = sending(calls.create_key)
    list = sending(calls.list_keys)
    revoke = sending(calls.revoke_key)

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncSnapshots:
    """``client.snapshots``: names for a scope at a time."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    create = sending(calls.create_snapshot)
    list = sending(calls.list_snapshots)
    delete = sending(calls.delete_snapshot)

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncScheduler:
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

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncNodes:
    """``client.nodes``: machines, and which tenants go where. Needs an operator's key."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_nodes)
    get = sending(calls.get_node)
    drain = sending(calls.drain_node)
    undrain = sending(calls.undrain_node)
    forget = sending(calls.forget_node)
    move_tenant = sending(calls.move_tenant)

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)


class AsyncProposals:
    """``client.proposals``: memories that could be one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    list = sending(calls.list_proposals)
    find = sending(calls.find_proposals)
    apply = sending(calls.apply_proposal)
    dismiss = sending(calls.dismiss_proposal)

    async def send(self, call: Call[T]) -> T:
        return await self._sender.send(call)
