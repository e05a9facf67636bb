"""Where the server is and with which key: arguments, then the environment, then serve.json.

``memcube serve`` writes serve.json into its data folder, so on the machine of the server nothing
need be set.
"""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from memcube.client.problems import Unreachable
from memcube.errors import BadRequest, Corrupt

DEFAULT_DATA_DIR = ".memcube"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A server's URL without a final slash, and the key for it."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    pid: int | None = None
    """The server's process, when it was started by ``memcube serve`` from this data folder."""

    @property
    def is_local(self) -> bool:
        """Whether the URL names this machine by its loopback address."""
        host = httpx.URL(self.url).host
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


def data_dir_of(
    data_dir: str | Path | None = None, *, environ: Mapping[str, str] = os.environ
) -> Path:
    """The data folder: the argument, else MEMCUBE_HOME, else ./.memcube."""
    return Path(data_dir or environ.get("MEMCUBE_HOME") or DEFAULT_DATA_DIR)


def find_address(
    url: str | None = None,
    api_key: str | None = None,
    *,
    data_dir: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Address:
    """The address to talk to.

    The key in serve.json is used only for the URL in it: a key never goes to another server.

    Raises:
        Unreachable: there is no address anywhere.
        BadRequest: the URL is none, or the key can't stand in a header.
        Corrupt: serve.json is needed and broken.
    """
    path = data_dir_of(data_dir, environ=environ) / "serve.json"
    given = url or environ.get("MEMCUBE_URL")
    key = api_key or environ.get("MEMCUBE_API_KEY")
    if key is not None and not is_header_text(key):
        # The key itself must not reach a log by way of this text.
        raise BadRequest("holds something else than printable ASCII characters", "api_key")
    try:
        local = _read(path)
    except (BadRequest, Corrupt):
        if given is None or key is None:
            raise
        local = None
    if given is None:
        if local is None:
            raise Unreachable(
                f"no server known: start one here with `memcube serve`, or set MEMCUBE_URL (--url) "
                f"and MEMCUBE_API_KEY (--key); looked for {path}"
            )
        return Address(url=local.url, api_key=key or local.api_key, pid=local.pid)
    given = _checked(given)
    if local is not None and local.url == given:
        return Address(url=given, api_key=key or local.api_key, pid=local.pid)
    return Address(url=given, api_key=key)


def is_header_text(text: str) -> bool:
    """Whether a text can be the value of an HTTP header."""
    return text.isascii() and text.isprintable()


def _read(path: Path) -> Address | None:
    try:
        data = json.loads(path.read_text())
        pid = data.get("pid")
        return Address(url=_checked(data["url"]), api_key=data["api_key"], pid=pid)
    except FileNotFoundError:
        return None
    except OSError as unreadable:
        raise BadRequest(f"can't be read: {unreadable.strerror}", str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Corrupt(
            str(path), "does not hold url and api_key; start the server again, or give --url"
        ) from None


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as invalid:
        raise BadRequest(f"{url!r} is no URL: {invalid}", "url") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BadRequest(f"{url!r} is no URL; expected one such as http://127.0.0.1:8000", "url")
    return url.rstrip("/")
