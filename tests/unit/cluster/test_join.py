"""How a node that joins finds the system and its token, and what it may be called."""

import json

import pytest

from actors.nodes import NODE_LABEL
from cluster.join import alone, labels_of, where
from memcube.errors import BadRequest, Unavailable


def test_the_data_folder_knows_address_and_token(tmp_path):
    with pytest.raises(Unavailable, match="no system runs in"):
        where(None, tmp_path, {})
    (tmp_path / "serve.json").write_text(json.dumps({"url": "http://a", "api_key": "k"}))
    with pytest.raises(BadRequest, match="ray_address"):
        where(None, tmp_path, {})
    (tmp_path / "serve.json").write_text(json.dumps({"ray_address": "10.0.0.1:6379"}))
    with pytest.raises(BadRequest, match=r"ray\.token"):
        where(None, tmp_path, {})
    (tmp_path / "ray.token").write_text("secret")
    assert where(None, tmp_path, {}) == ("10.0.0.1:6379", tmp_path / "ray.token")
    assert where("other:1", tmp_path, {}) == ("other:1", tmp_path / "ray.token")


def test_on_another_machine_address_and_token_are_given():
    with pytest.raises(BadRequest, match="address"):
        where(None, None, {"RAY_AUTH_TOKEN": "secret"})
    with pytest.raises(BadRequest, match="RAY_AUTH_TOKEN_PATH"):
        where("head:1", None, {})
    assert where("head:1", None, {"RAY_AUTH_TOKEN_PATH": "t"}) == ("head:1", None)


def test_labels_name_the_node_and_say_what_else_it_is():
    assert labels_of("b", ["zone=west", "example.org/fast=true"]) == {
        NODE_LABEL: "b",
        "zone": "west",
        "example.org/fast": "true",
    }


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "a" * 64])
def test_a_name_that_ray_would_not_take_is_refused(name):
    with pytest.raises(BadRequest, match="name"):
        labels_of(name, [])


@pytest.mark.parametrize("label", ["zone", "=west", "zone=a b", "zone=a/b", f"{NODE_LABEL}=c"])
def test_a_label_that_is_none_is_refused(label):
    with pytest.raises(BadRequest, match="label"):
        labels_of("b", [label])


def test_one_node_at_a_time_starts_on_a_machine(tmp_path):
    path = tmp_path / "lock"
    with alone(path), pytest.raises(Unavailable, match="another node"), alone(path, within_s=0):
        pass
    with alone(path, within_s=0):
        pass
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Unavailable, match="can't be opened"), alone(tmp_path / "link"):
        pass
