"""Remember a file as a job: ``ray job submit -- python -m jobs.ingest FILE --user ann``.

The file must lie where the job runs. Formats, batches and the journal are those of ``memcube
ingest``: what an earlier run sent is not sent again.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from memcube.client import AsyncMemCubeClient
from memcube.client.address import data_dir_of
from memcube.errors import MemCubeError
from memcube.ingest import FORMATS, Ingested, Journal, Plan, Target, ingest, make_plan, read_file
from memcube.ingest.plan import journal_path

TOLD_EVERY = 0.1
"""Progress is a line of the job's log for each such share of the file."""


def main(arguments: list[str] | None = None) -> int:
    """Ingest a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ingest", description="Remember a whole file."
    )
    parser.add_argument("file", type=Path, help="LoCoMo JSON, message JSONL or plain text")
    parser.add_argument("--format", choices=sorted(FORMATS), help="default: told by the content")
    parser.add_argument("--user", help="whose memory it becomes")
    parser.add_argument("--agent", help="which agent's")
    parser.add_argument("--run", help="which run's")
    parser.add_argument("--tag", action="append", default=[], help="can be given again")
    parser.add_argument("--data", type=Path, help="the data folder, for serve.json and the journal")
    given = parser.parse_args(arguments)
    target = Target(
        user_id=given.user, agent_id=given.agent, run_id=given.run, tags=tuple(given.tag)
    )
    try:
        plan = make_plan(read_file(given.file, format=given.format, target=target))
        done = asyncio.run(_send(plan, data_dir_of(given.data)))
    except MemCubeError as failed:
        print(f"jobs.ingest: {failed}", file=sys.stderr)
        return 1
    print(f"{done.added} added, {done.repeated} known already, {done.skipped} sent before")
    return 0


async def _send(plan: Plan, data_dir: Path) -> Ingested:
    async with AsyncMemCubeClient(data_dir=data_dir) as client:
        address = client.address
        path = journal_path(data_dir, plan, url=address.url, api_key=address.api_key)
        done, told = 0, 0.0

        def tell(num_items: int) -> None:
            nonlocal done, told
            done += num_items
            if done / plan.num_items >= told:
                print(f"{done} of {plan.num_items}", flush=True)
                told = done / plan.num_items + TOLD_EVERY

        return await ingest(
            client, plan, Journal(path, num_streams=len(plan.streams)), progress=tell
        )


if __name__ == "__main__":
    sys.exit(main())
