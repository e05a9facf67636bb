"""The routes of the nodes: which there are, which are emptied, and which tenants go where.

All are an operator's. What is asked for is noted in the catalog when it is answered, and carried out by the
scheduler in its next rounds.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from fastapi import Path
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from memcube.catalog import Catalog, NodeRecord, ShardRecord
from memcube.ids import TenantId
from memcube.scheduler.actions import shard_at
from memcube.scheduler.tenant_moves import tenant_move
from serve import views
from serve.backend import Backend
from serve.dependencies import Here, Operator, guarded
from serve.models import Body, Id, examples
from serve.scheduler import EventOut, task_view

nodes = guarded("/v1/nodes", "nodes")
tenants = guarded("/v1/tenants", "nodes")

NodeName = Annotated[str, Path(max_length=255, examples=["b"])]
TenantName = Annotated[str, Path(max_length=63, examples=["default"])]


class NodeState(StrEnum):
    """What becomes of a node. ``drained``: nothing lies there that would be missed."""

    UP = "up"
    DRAINING = "draining"
    DRAINED = "drained"
    DOWN = "down"


class ClusterNodeOut(BaseModel):
    """A node. `drained` is one that drains and on which no tenant lies and no KV is listed: it may be stopped."""

    name: str
    state: NodeState
    since: datetime = Field(
        description="When it came, went, or was told to drain or to stop draining."
    )
    labels: dict[str, str]
    is_head: bool
    shards: list[int] = Field(description="Shards of the plaintext tier that run there.")
    home_of: list[int] = Field(description="Shards that belong there, wherever they run.")
    num_tenants: int = Field(description="Tenants in the shards that run there.")


class ClusterNodesOut(BaseModel):
    nodes: list[ClusterNodeOut]


class ForgottenOut(BaseModel):
    name: str
    forgotten: Literal[True] = True


class MoveBody(Body):
    """Where a tenant shall lie."""

    to: Id = Field(description="A node's name, or one of its labels, such as `zone=b`.")
    model_config = examples({"to": "b"})


@nodes.get("", response_model=ClusterNodesOut, summary="List the nodes")
async def list_nodes(who: Operator, here: Here) -> JSONResponse:
    """All nodes that were not forgotten, by name."""

    def work() -> list[dict[str, Any]]:
        book = here.catalog.shards
        shards = book.shards()
        return [_view(here.catalog, node, shards) for node in book.nodes()]

    return JSONResponse({"nodes": await asyncio.to_thread(work)})


@nodes.get("/{name}", response_model=ClusterNodeOut, summary="Get a node")
async def get_node(name: NodeName, who: Operator, here: Here) -> JSONResponse:
    """One node by its name."""

    def work() -> dict[str, Any]:
        return _view(here.catalog, here.catalog.shards.node(name), here.catalog.shards.shards())

    return JSONResponse(await asyncio.to_thread(work))


@nodes.post("/{name}/drain", response_model=ClusterNodeOut, summary="Empty a node")
async def drain(name: NodeName, who: Operator, here: Here) -> JSONResponse:
    """It takes nothing new, and the scheduler moves its tenants and its KV to others, while they are served.
    When it is `drained` it may be stopped. May be repeated; holds until it is taken back."""
    return await _drain(here, name, True)


@nodes.post("/{name}/undrain", response_model=ClusterNodeOut, summary="Use a node again")
async def undrain(name: NodeName, who: Operator, here: Here) -> JSONResponse:
    """Take the word back that it is to be emptied. What has left it does not return by itself."""
    return await _drain(here, name, False)


@nodes.delete("/{name}", response_model=ForgottenOut, summary="Forget a node that is down")
async def forget(name: NodeName, who: Operator, here: Here) -> JSONResponse:
    """Take a node off the list that will not come back: its shards then belong where they run. Refused while
    it is up."""
    await asyncio.to_thread(here.catalog.shards.forget_node, name, now=here.clock())
    return JSONResponse({"name": name, "forgotten": True})


@tenants.post(
    "/{tenant}/move", status_code=202, response_model=EventOut, summary="Send a tenant to a node"
)
async def move_tenant(
    tenant: TenantName, body: MoveBody, who: Operator, here: Here
) -> JSONResponse:
    """Queue that a tenant's memories go to a node, while they are searched and written; follow it at
    `/v1/events/{id}/wait`. May be repeated. Of several words for one tenant the last one holds; the task of an
    earlier one is done then, with the outcome `superseded`."""

    def work() -> dict[str, Any]:
        catalog, id = here.catalog, TenantId(tenant)
        catalog.shards.shard_of(id)
        catalog.shards.nodes_with(body.to)
        new = tenant_move(id, body.to)
        return task_view(catalog.tasks.supersede(id, new, now=here.clock()))

    return JSONResponse(await asyncio.to_thread(work), 202)


async def _drain(here: Backend, name: str, draining: bool) -> JSONResponse:
    def work() -> dict[str, Any]:
        book = here.catalog.shards
        return _view(here.catalog, book.drain(name, draining, now=here.clock()), book.shards())

    return JSONResponse(await asyncio.to_thread(work))


def _view(catalog: Catalog, node: NodeRecord, shards: Sequence[ShardRecord]) -> dict[str, Any]:
    here = [shard for shard in shards if shard.epoch and shard.node == node.name]
    num_tenants = sum(shard.num_tenants for shard in here)
    return {
        "name": node.name,
        "state": _state(catalog, node, [shard.shard for shard in here], num_tenants),
        "since": views.moment(node.since),
        "labels": dict(node.labels),
        "is_head": node.is_head,
        "shards": [shard.shard for shard in here],
        "home_of": [shard.shard for shard in shards if shard.home == node.name],
        "num_tenants": num_tenants,
    }


def _state(
    catalog: Catalog, node: NodeRecord, shards: Sequence[int], num_tenants: int
) -> NodeState:
    if not node.alive:
        return NodeState.DOWN
    if not node.draining:
        return NodeState.UP
    is_empty = num_tenants == 0 and not catalog.kv.is_listed_on(node.name)
    if not is_empty or _is_awaited(catalog, node.name, shards):
        return NodeState.DRAINING
    return NodeState.DRAINED


def _is_awaited(catalog: Catalog, node: str, shards: Sequence[int]) -> bool:
    """Whether something that was planned before the node drained is on its way there."""
    targets = [action.target for action in catalog.actions.open() if action.target is not None]
    return any(to.node == node or shard_at(to.location) in shards for to in targets)
