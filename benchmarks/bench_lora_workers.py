"""An adapter trained by two workers beside one, and with one of the two killed on the way.

    python -m benchmarks.bench_lora_workers [--steps 12]

The real model and DeepSpeed over gloo, as actors of a Ray of its own. In float32, where the same sums
taken in another order are all that differs, and in bfloat16, as adapters are trained. CPU time is of the
workers' processes, with the start of each: most of it is the import of torch and the loading of the model.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.lora_facts import invented_facts
from benchmarks.results import Figure, write_results
from cluster import environment
from memcube.config import Config, ModelConfig, TrainingConfig
from memcube.errors import Unavailable
from memcube.parametric.dataset import DataSettings, ProbeKind, build_training_set
from memcube.parametric.recipe import Recipe
from memcube.parametric.work import Phase, TrainingWork, Worked, WorkProgress, adapter_weights

FACTS, EACH = 2, 2


@dataclass(slots=True)
class _Seen:
    """What one training showed of itself: CPU seconds by process, when it took steps."""

    began: float = field(default_factory=time.monotonic)
    cpu_s: dict[int, float] = field(default_factory=dict)
    kill_at: int | None = None
    killed: float | None = None
    first_step: int | None = None
    first_step_after_s: float | None = None

    def __call__(self, told: WorkProgress) -> None:
        processes = _workers()
        for process in processes:
            times = process.cpu_times()
            self.cpu_s[process.pid] = times.user + times.system
        if told.phase is not Phase.TRAINING:
            return
        if self.first_step is None:
            self.first_step = told.done
            self.first_step_after_s = time.monotonic() - self.began
        if self.kill_at is not None and told.done >= self.kill_at and self.killed is None:
            processes[-1].kill()
            self.killed = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        temporary = environment.prepare(Path(folder))
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            namespace="memcube",
            include_dashboard=False,
            object_store_memory=100 << 20,
            _temp_dir=str(temporary),
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )
        try:
            _measure(Path(folder), args.steps)
        finally:
            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)


def _measure(folder: Path, steps: int) -> None:
    work = _work(steps)
    exact = replace(work, recipe=replace(work.recipe, autocast=False))
    trained: dict[str, Worked] = {}
    seen: dict[str, _Seen] = {}

    def train(name: str, given: TrainingWork, workers: int, into: str | None = None) -> None:
        seen[name] = _Seen()
        trained[name] = _run(given, folder / (into or name), workers, seen[name])
        print(name, [round(step[0], 6) for step in trained[name].history], flush=True)

    train("one", exact, 1)
    train("two", exact, 2)
    train("one, bfloat16", work, 1)
    train("two, bfloat16", work, 2)
    killed = _Seen(kill_at=steps // 2)
    until_seen_s = -1.0
    try:
        _run(exact, folder / "killed", 2, killed)
    except Unavailable as gone:
        assert killed.killed is not None
        until_seen_s = time.monotonic() - killed.killed
        print(f"killed after step {killed.kill_at}: {gone}", flush=True)
    train("two, killed and gone on", exact, 2, into="killed")
    resumed = seen["two, killed and gone on"]
    cpu_s = {name: sum(each.cpu_s.values()) for name, each in seen.items()}
    figures = [
        Figure(
            name="two workers, ZeRO-2: loss apart from one worker's, at the most",
            value=_apart(trained["one"], trained["two"]),
            unit="nats",
            goal="<= 1e-4",
        ),
        Figure(
            name="the same, trained in bfloat16",
            value=_apart(trained["one, bfloat16"], trained["two, bfloat16"]),
            unit="nats",
        ),
        Figure(
            name="kill -9 of a worker, gone on: weights apart from the undisturbed",
            value=_weights_apart(trained["two"], trained["two, killed and gone on"], work.recipe),
            unit="",
            goal="<= 1e-5",
        ),
        Figure(name="kill -9 of a worker until the run has ended", value=until_seen_s, unit="s"),
        Figure(
            name="from then until the next step, all processes new",
            value=resumed.first_step_after_s or -1.0,
            unit="s",
        ),
        *(
            Figure(name=f"{name}: training", value=value, unit="CPU-s")
            for name, value in cpu_s.items()
        ),
    ]
    write_results(
        "lora_workers",
        " ".join(["python -m benchmarks.bench_lora_workers", *sys.argv[1:]]),
        figures,
        recipe=asdict(work.recipe),
        losses={name: [step[0] for step in each.history] for name, each in trained.items()},
        killed_after_step=killed.kill_at,
        first_step_after_it=resumed.first_step,
    )


def _work(steps: int) -> TrainingWork:
    facts = invented_facts(FACTS, EACH, seed=0)
    data = build_training_set(facts, settings=DataSettings(), seed=0)
    probes = [probe for probe in data.probes if probe.kind is ProbeKind.RECALL][:2]
    recipe = Recipe(
        steps=steps,
        warmup_steps=2,
        decay_steps=steps // 3,
        check_steps=0,
        checkpoint_steps=max(1, steps // 6),
    )
    return TrainingWork(
        data=replace(data, probes=tuple(probes)),
        recipe=recipe,
        unrelated=("The library opens at nine and closes at six.",),
        enough=None,
    )


def _run(work: TrainingWork, folder: Path, workers: int, seen: _Seen) -> Worked:
    from actors.adapter_trainer import spawn_trainer_group

    config = Config(
        model=ModelConfig(dtype="float32", device="cpu"),
        training=TrainingConfig(
            engine="deepspeed", zero_stage=2 if workers > 1 else 0, workers=workers, timeout_s=300
        ),
    )
    group = spawn_trainer_group(config, work, folder, job_id=folder.name)
    return asyncio.run(group.run(progress=seen))


def _workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "AdapterTrainerActor" in " ".join(process.cmdline())
    ]


def _apart(one: Worked, two: Worked) -> float:
    return max(abs(a[0] - b[0]) for a, b in zip(one.history, two.history, strict=True))


def _weights_apart(one: Worked, two: Worked, recipe: Recipe) -> float:
    folders = [worked.adapter for worked in (one, two) if worked.adapter is not None]
    a, b = (adapter_weights(each, base="", recipe=recipe).tensors() for each in folders)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


if __name__ == "__main__":
    main()
