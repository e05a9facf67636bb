import socket
from pathlib import Path

import pytest

from memcube import ports
from memcube.errors import Conflict


def test_ports_are_distinct_and_none_that_a_connection_of_another_may_take():
    found = ports.free_ports(50)
    assert len(set(found)) == 50
    settings = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(settings.read_text().split()[0]) if settings.exists() else 32_768
    assert max(found) < max(first, 32_768)
    assert min(found) > 19_999


def test_what_is_listened_on_is_not_given_out(monkeypatch):
    with socket.socket() as taken:
        port = ports.free_ports(1)[0]
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not ports.is_free("127.0.0.1", port)
        monkeypatch.setattr(ports, "FIRST", port)
        monkeypatch.setattr(ports, "END", port + 1)
        with pytest.raises(Conflict, match="no 1 free ports"):
            ports.free_ports(1)


def test_ports_in_a_row_are_free_each():
    start = ports.free_range(40)
    assert ports.FIRST <= start <= ports.END - 40
