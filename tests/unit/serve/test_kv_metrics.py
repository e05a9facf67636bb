"""What /metrics tells of the activation tier."""

import asyncio
from dataclasses import replace

import pytest

from memcube.errors import TooBusy
from serve import backend, kv_metrics

MODEL = "SmolLM2-135M-Instruct"


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def scraped(api, key: str | None = None) -> dict[str, float]:
    response = await api.call("GET", "/metrics", key=key)
    assert response.status_code == 200
    return samples(response.text)


def asked(**more):
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}


async def test_a_scrape_tells_of_hits_bytes_evictions_times_and_the_line(counted):
    counted.system.engines[0].waiting = 7
    id = await counted.add("Ann moved to Oslo")
    size = (await counted.ok("POST", f"/v1/cubes/{id}/migrate", {"tier": "activation"}))[
        "size_bytes"
    ]
    told = await scraped(counted)
    assert told['memcube_engine_up{engine="0"}'] == 1
    assert told['memcube_kv_hit_ratio{kind="exact"}'] == 0.6
    assert told['memcube_kv_hit_ratio{kind="composed"}'] == 0.1
    assert told['memcube_kv_hit_ratio{kind="none"}'] == 0.3
    assert told['memcube_kv_bytes{medium="device",place="engine-0"}'] == size
    assert told['memcube_kv_bytes{medium="disk",place="node-1"}'] == 700
    gone = 'memcube_kv_gone_total{medium="%s",place="%s",reason="%s"}'
    assert told[gone % ("device", "engine-0", "capacity")] == 3
    assert told[gone % ("disk", "node-1", "evicted: tenant's budget")] == 4
    assert told['memcube_engine_requests{engine="0",state="waiting"}'] == 7
    assert told['memcube_engine_tokens_per_second{engine="0",kind="generated"}'] == 2.5
    ttft = 'memcube_engine_ttft_seconds_bucket{engine="0",kind="exact",le="%s"}'
    assert (told[ttft % "0.01"], told[ttft % "+Inf"]) == (1, 1)
    assert told['memcube_engine_ttft_seconds_count{engine="0",kind="exact"}'] == 1


async def test_a_scrape_tells_of_adapters_where_there_are_some(counted):
    told = await scraped(counted)
    one = {"resident": 2, "resident_bytes": 500, "loads_total": 3, "load_seconds_total": 0.3}
    for name, value in {**one, "evictions_total": 1}.items():
        assert told[f'memcube_adapter_{name}{{engine="0"}}'] == value
    assert told['memcube_adapter_refused_total{code="corrupt",engine="0"}'] == 4
    swap = 'memcube_adapter_wait_seconds_%s{engine="0",kind="resident"}'
    assert (told[swap % "count"], told[swap % "sum"]) == (1, 0.01)
    engine = counted.system.engines[0]
    without = replace(await engine.stats(), adapters=None)
    text = kv_metrics.text([without], name_tenants=False).decode()
    assert not any(name.startswith("memcube_adapter") for name in samples(text))


async def test_tenants_are_named_to_an_operator_alone(api, operator, admin, other):
    id = await api.add("Ann moved to Oslo")
    await api.ok("POST", f"/v1/cubes/{id}/migrate", {"tier": "activation"})
    assert 'memcube_kv_tenant_bytes{medium="disk",tenant="acme"}' in await scraped(api, operator)
    for key in (None, admin, other, "mk_wrong"):
        told = await scraped(api, key)
        assert not [name for name in told if "tenant_bytes" in name or "acme" in name]


async def test_many_tenants_are_a_bounded_number_of_series(api):
    moment = await api.system.engines[0].stats()
    sizes = {f"tenant-{n}": n for n in range(1000)}
    many = replace(moment, engine=replace(moment.engine, bytes_by_tenant=sizes), media=[])
    told = samples(kv_metrics.text([many], name_tenants=True).decode())
    found = {name: size for name, size in told.items() if "tenant_bytes" in name}
    assert len(found) == kv_metrics.MAX_TENANTS + 1
    assert sum(found.values()) == sum(sizes.values())
    assert 'memcube_kv_tenant_bytes{medium="device",tenant="(others)"}' in found


async def test_media_that_engines_share_are_told_of_once(api):
    moment = await api.system.engines[0].stats()
    told = samples(kv_metrics.text([moment, moment], name_tenants=False).decode())
    places = [name for name in told if name.startswith("memcube_kv_bytes")]
    assert len(places) == 3
    assert told['memcube_kv_bytes{medium="disk",place="node-1"}'] == 700


@pytest.mark.parametrize("how", ["down", "silent"])
async def test_a_dead_engine_breaks_no_scrape(counted, monkeypatch, how):
    engine = counted.system.engines[0]
    if how == "down":
        engine.down = True
    else:
        monkeypatch.setattr(backend, "STATS_DEADLINE_S", 0.01)
        monkeypatch.setattr(engine, "stats", asyncio.Event().wait)
    told = await scraped(counted)
    assert told['memcube_engine_up{engine="0"}'] == 0
    assert not [name for name in told if name.startswith("memcube_kv_bytes")]
    assert "memcube_index_pending" in told


async def test_without_a_chat_model_there_is_nothing_to_tell(counted):
    object.__setattr__(counted.app.state.backend, "kv_stats", None)
    assert not [name for name in await scraped(counted) if "engine" in name]


async def test_refused_chats_are_counted_by_their_problem(counted):
    engine = counted.system.engines[0]
    engine.failing = (0, TooBusy("64 requests wait for the model", 3.0))
    response = await counted.call("POST", "/v1/chat/completions", asked())
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    told = await scraped(counted)
    assert told['memcube_chat_refused_total{code="too_busy"}'] == 1
