"""The commands of the nodes, against a small server in memory."""

import json

import pytest

from memcube.cli import nodes
from memcube.testing.api import FakeApi


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_S", 0.0)
    api = FakeApi()
    api.node("a", is_head=True, shards=[0], home_of=[0, 2], num_tenants=1)
    api.node("b", num_tenants=3, labels={"zone": "west"})
    return api


def test_nodes_are_listed(memcube, api):
    code, out, _ = memcube("node", "list")
    assert code == 0
    assert out.splitlines() == [
        "a  up  head  shards 0  home of 0,2  1 tenant",
        "b  up  shards none  home of none  3 tenants  zone=west",
    ]
    assert json.loads(memcube("node", "list", "--json")[1]) == list(api.nodes.values())


def test_a_node_is_drained_and_how_many_tenants_are_left_is_told(memcube, api):
    code, out, err = memcube("node", "drain", "b", "--wait")
    assert (code, "drained" in out) == (0, True)
    assert err.splitlines() == [
        "left there: 3 tenants",
        "left there: 2 tenants",
        "left there: 1 tenant",
    ]
    assert memcube("node", "undrain", "b")[1].startswith("b  up")
    assert memcube("node", "drain", "b")[1].startswith("b  draining")


def test_to_wait_for_a_node_that_goes_down_ends_with_an_error(memcube, api, monkeypatch):
    monkeypatch.setattr(nodes.time, "sleep", lambda _: api.node("b", state="down"))
    code, _, err = memcube("node", "drain", "b", "--wait")
    assert code == 1
    assert "node b is down, and is not being drained" in err


def test_only_a_node_that_is_down_is_forgotten(memcube, api):
    code, _, err = memcube("node", "forget", "b")
    assert (code, "is up" in err) == (1, True)
    api.node("b", state="down")
    assert memcube("node", "forget", "b")[:2] == (0, "forgot b\n")
    assert set(api.nodes) == {"a"}


def test_a_tenant_is_sent_to_a_node(memcube, api):
    code, out, _ = memcube("migrate-tenant", "acme", "--to", "b")
    assert (code, "acme  waiting" in out) == (0, True)
    assert json.loads(api.requests[-1].content) == {"to": "b"}
    code, _, err = memcube("migrate-tenant", "acme", "--to", "c")
    assert (code, "no node 'c'" in err) == (1, True)


def test_a_move_is_waited_for_to_its_end(memcube, api, monkeypatch):
    def later(result):
        def work(self, id, **_):
            ended = {"state": "done", "ended": True, "result": result}
            api.events[id] |= ended if api.events[id].get("outcome") else {"outcome": "on its way"}
            return self.event(id)

        return work

    waiting = "memcube.client.sync.Scheduler.wait"
    monkeypatch.setattr(waiting, later({"shard": 1, "node": "b"}))
    code, out, err = memcube("migrate-tenant", "acme", "--to", "b", "--wait")
    assert (code, "acme  done" in out, err) == (0, True, "on its way\n")
    monkeypatch.setattr(waiting, later({"outcome": "superseded", "by": "9"}))
    code, _, err = memcube("migrate-tenant", "acme", "--to", "b", "--wait")
    assert (code, "acme was not sent to b" in err) == (1, True)
