"""Train an adapter as a job: ``ray job submit -- python -m jobs.consolidate --user ann``.

The system's own runner does the work, as for ``memcube consolidate`` and ``POST /v1/jobs``; this
queues it, follows it, and ends as it ends. Submitted again with the same submission id it finds the
job that it queued before.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from memcube.client import Job, MemCubeClient
from memcube.client.address import data_dir_of
from memcube.errors import MemCubeError

POLL_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Consolidate; returns the exit status: 0 done, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.consolidate", description="Train an adapter with memories."
    )
    parser.add_argument("cubes", nargs="*", help="ids of memories; none: all of the scope")
    parser.add_argument("--user", help="whose memory")
    parser.add_argument("--agent", help="which agent's")
    parser.add_argument("--run", help="which run's")
    parser.add_argument("--adapter", help="its name; made of the scope by default")
    parser.add_argument("--stable-days", type=float, help="not changed for so many days")
    parser.add_argument("--min-uses", type=int, help="used at least so often")
    parser.add_argument("--seed", type=int, help="the same seed, the same adapter")
    parser.add_argument("--data", type=Path, help="the data folder, for serve.json")
    given = parser.parse_args(arguments)
    try:
        with MemCubeClient(data_dir=data_dir_of(given.data)) as client:
            job = client.jobs.consolidate(
                cubes=given.cubes,
                user_id=given.user,
                agent_id=given.agent,
                run_id=given.run,
                adapter=given.adapter,
                stable_days=given.stable_days,
                min_uses=given.min_uses,
                recipe=None if given.seed is None else {"seed": given.seed},
                idempotency_key=submission_id(os.environ),
            )
            return 0 if _followed(client, job).state == "done" else 1
    except MemCubeError as failed:
        print(f"jobs.consolidate: {failed}", file=sys.stderr)
        return 1


def submission_id(environ: Mapping[str, str]) -> str | None:
    """What Ray calls the job that this process is, if it is one."""
    try:
        return json.loads(environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return None


def _followed(client: MemCubeClient, job: Job) -> Job:
    print(f"job {job.id}", flush=True)
    told, percent = 0, -10
    while True:
        job = client.jobs.get(job.id)
        for line in client.jobs.logs(job.id, after=told):
            print(line.text, flush=True)
            told = line.seq
        if job.has_ended:
            return job
        if total := job.progress.get("num_steps"):
            done = 100 * job.progress["step"] // total
            if done >= percent + 10:
                percent = done
                print(f"{done}%, answer loss {job.progress['answer_loss']:.3f}", flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
