from types import SimpleNamespace

import pytest
import torch

from memcube.activation.blocks import Block, Place
from memcube.activation.lower import StoreBelow
from memcube.testing.tiny_lm import tiny_model

LOADED = tiny_model()


class Shelf:
    """A node's store, in a dict."""

    def __init__(self):
        self.payloads, self.items = {}, {}

    def put(self, payload, item, members):
        self.payloads[payload.key], self.items[payload.key] = payload, item

    def get(self, keys):
        return [self.payloads.get(key) for key in keys]


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def below(shelf):
    return StoreBelow(shelf, LOADED, codec="raw")


def block(key, start, parent, num_tokens=16):
    kv_L2HND = torch.randn(
        LOADED.layout.shape(num_tokens), generator=torch.Generator().manual_seed(start)
    )
    return Block(
        key=key,
        start=start,
        kv_L2HND=kv_L2HND,
        tenant="a",
        group="talk",
        cubes=frozenset({"x"}),
        saves_s=1.0,
        parent=parent,
        token_ids=tuple(range(num_tokens)),
    )


def test_blocks_go_down_as_links_of_their_chain_and_segments_by_themselves(below, shelf):
    below.offer([block("first", 0, "root"), block("second", 16, "first"), block("alone", 9, None)])
    assert {key: payload.kind for key, payload in shelf.payloads.items()} == {
        "first": "block",
        "second": "block",
        "alone": "segment",
    }
    assert {key: item.parent for key, item in shelf.items.items()} == {
        "first": "root",
        "second": "first",
        "alone": None,
    }


def test_what_comes_up_is_what_went_down(below):
    down = block("alone", 9, None)
    below.offer([down])
    found = below.fetch([Place("alone", 9), Place("unknown", 0)])
    assert found.keys() == {"alone"}
    torch.testing.assert_close(found["alone"], down.kv_L2HND, atol=1e-5, rtol=1e-5)


def test_kv_of_another_model_is_a_miss(below, shelf):
    below.offer([block("first", 0, "root")])
    payload = shelf.payloads["first"]
    shelf.get = lambda keys: [SimpleNamespace(model="another", num_tokens=payload.num_tokens)]
    assert below.fetch([Place("first", 0)]) == {}
