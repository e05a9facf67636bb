"""The cluster's nodes, by names that stay the same when a node's Ray is started again.

A node is named by the label ``memcube.io/node`` that its Ray was started with, else by its host's name;
where another node has that name too, a piece of Ray's own id follows it.
"""

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memcube.catalog import NodeSeen

NODE_LABEL = "memcube.io/node"
HEAD = "node:__internal_head__"
"""The resource that Ray gives the node with its control store."""


def named_nodes() -> dict[str, dict[str, Any]]:
    """What Ray says of each node, by our name; of several that had a name, the one that is alive."""
    found: dict[str, dict[str, Any]] = {}
    nodes = sorted(ray.nodes(), key=lambda node: node["Alive"])
    hosts = Counter(node["NodeManagerHostname"] for node in nodes if node["Alive"])
    for node in nodes:
        host = node["NodeManagerHostname"]
        name = node["Labels"].get(NODE_LABEL)
        if name is None:
            is_alone = HEAD in node["Resources"] or hosts[host] <= 1
            name = host if is_alone else f"{host}-{node['NodeID'][:6]}"
        found[name] = node
    return found


def nodes_seen() -> list[NodeSeen]:
    """The nodes that the cluster has now, and those that it had and lost."""
    return [
        NodeSeen(
            name=name,
            labels={k: v for k, v in node["Labels"].items() if not k.startswith("ray.io/")},
            alive=node["Alive"],
            is_head=HEAD in node["Resources"],
        )
        for name, node in named_nodes().items()
    ]


def this_node() -> str:
    """The name of the node that this process runs on."""
    id = ray.get_runtime_context().get_node_id()
    return next((name for name, node in named_nodes().items() if node["NodeID"] == id), id)


PLACED = 0.001
"""CPUs of an actor that belongs on a node. One that takes none is put anywhere by Ray (2.60), whatever
its node affinity says."""


def on_head() -> NodeAffinitySchedulingStrategy | str:
    """Ray's strategy for an actor of the control plane: the head's, with which the cluster ends anyway."""
    for node in ray.nodes():
        if node["Alive"] and HEAD in node["Resources"]:
            return NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
    return "DEFAULT"


def on_node(name: str) -> NodeAffinitySchedulingStrategy | str:
    """Ray's strategy for an actor that belongs on a node, and goes elsewhere when that one is down."""
    node = named_nodes().get(name)
    if node is None or not node["Alive"]:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
