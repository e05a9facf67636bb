"""What the global options say about the server, and clients made of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import typer

from memcube.client import AsyncMemCubeClient, MemCubeClient
from memcube.client.address import data_dir_of

User = Annotated[str | None, typer.Option("--user", "-u", help="Whose memory.")]
Agent = Annotated[str | None, typer.Option("--agent", help="Which agent's memory.")]
Run = Annotated[str | None, typer.Option("--run", help="Which run or session.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag; can be given again.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the server. ``transport`` replaces the network, for tests."""

    url: str | None
    api_key: str | None = field(repr=False)
    given_data_dir: Path | None
    transport: httpx.MockTransport | None = None

    @property
    def data_dir(self) -> Path:
        return data_dir_of(self.given_data_dir)

    def open(self) -> MemCubeClient:
        return MemCubeClient(
            self.url, self.api_key, data_dir=self.data_dir, transport=self.transport
        )

    def open_async(self) -> AsyncMemCubeClient:
        return AsyncMemCubeClient(
            self.url, self.api_key, data_dir=self.data_dir, transport=self.transport
        )
