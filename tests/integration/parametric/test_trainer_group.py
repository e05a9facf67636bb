"""Workers of a training as actors of a real Ray: DeepSpeed over gloo, kill -9, stop, cleaning up."""

import asyncio
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table

from actors.adapter_trainer import TrainerGroup, spawn_trainer_group
from memcube.activation.models import load_model
from memcube.config import Config, ModelConfig, TrainingConfig
from memcube.errors import BadRequest, Conflict, Unavailable
from memcube.parametric import checkpoints
from memcube.parametric.dataset import Example, Probe, ProbeKind, TrainingSet
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import Outcome
from memcube.parametric.work import Phase, TrainingWork, Worked, adapter_weights, perform
from memcube.testing.tiny_lm import tiny_model

pytestmark = pytest.mark.long

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORK = TrainingWork(
    data=TrainingSet(
        examples=tuple(Example(question=f"What is {n}?", answer=f"It is {n}.") for n in range(24)),
        replay=tuple(Example(question=None, answer=f"Some text of number {n}.") for n in range(6)),
        early=(),
        probes=(Probe(kind=ProbeKind.RECALL, question="What is 3?", expected=("3",)),),
        seed=0,
    ),
    recipe=Recipe(
        rank=4,
        alpha=8,
        lr=1e-2,
        steps=40,
        decay_steps=3,
        warmup_steps=1,
        row_tokens=200,
        rows=2,
        replay_tokens=60,
        check_steps=0,
        checkpoint_steps=10,
        autocast=False,
    ),
    unrelated=("Some text.",),
    enough=None,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    # Ray would write it into the home folder.
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    ray.init(
        address="local",
        num_cpus=2,
        namespace="memcube",
        include_dashboard=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    loaded = loaded_model()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def group_of(model: str, folder: Path, work: TrainingWork = WORK, **training) -> TrainerGroup:
    settings = {"workers": 2, "zero_stage": 2, "place_s": 120.0, **training}
    config = Config(
        model=ModelConfig(name=model, device="cpu"),
        model_cache=folder.parent / "models",
        training=TrainingConfig(**settings),
    )
    return spawn_trainer_group(config, work, folder, job_id=folder.name)


def difference(one: Worked, two: Worked) -> float:
    a, b = (adapter_weights(w.adapter, base="", recipe=WORK.recipe).tensors() for w in (one, two))
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def workers() -> list[psutil.Process]:
    """Those that train now: a process of an actor is named after its class and the call it is in."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "AdapterTrainerActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def is_cleaned_up() -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        if not workers() and not groups:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def undisturbed(cluster, model, tmp_path_factory) -> Worked:
    return asyncio.run(group_of(model, tmp_path_factory.mktemp("two") / "run").run())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Worked:
    """By one worker, torch, and no Ray."""
    return perform(WORK, loaded_model(), tmp_path_factory.mktemp("one") / "run")


def loaded_model():
    loaded = tiny_model()
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def furthest(one: Worked, two: Worked) -> float:
    """How far the losses of two trainings are apart, at the most."""
    return max(abs(a[0] - b[0]) for a, b in zip(one.history, two.history, strict=True))


def test_two_workers_train_what_one_trains(undisturbed, alone):
    assert alone.outcome is undisturbed.outcome is Outcome.DONE
    assert furthest(alone, undisturbed) < 1e-4
    assert undisturbed.report is not None
    assert is_cleaned_up()
    tensors = adapter_weights(undisturbed.adapter, base="", recipe=WORK.recipe).tensors()
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_a_worker_that_is_killed_ends_the_run_and_the_next_goes_on(
    undisturbed, alone, model, tmp_path
):
    group = group_of(model, tmp_path / "run")
    killed_at = []

    def kill(told):
        if told.done >= 12 and not killed_at:
            workers()[-1].kill()
            killed_at.append(time.monotonic())

    with pytest.raises(Unavailable):
        asyncio.run(group.run(progress=kill))
    assert time.monotonic() - killed_at[0] < 60
    assert is_cleaned_up()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    seen = []
    resumed = asyncio.run(group.run(progress=seen.append))
    first = next(told for told in seen if told.phase is Phase.TRAINING)
    assert first.done > 10
    assert difference(resumed, undisturbed) <= 1e-5
    assert resumed.report == undisturbed.report
    # One worker, with torch, goes on from what two of DeepSpeed left.
    assert furthest(perform(WORK, other_model(model), tmp_path / "copy"), alone) < 1e-4


def other_model(folder: str):
    """The model as the workers load it."""
    return load_model(ModelConfig(name=folder, device="cpu"), Path(folder).parent / "models")


def test_a_stopped_run_keeps_its_last_step(cluster, model, tmp_path):
    steps = []
    group = group_of(model, tmp_path / "run", workers=1, engine="torch")
    stopped = asyncio.run(
        group.run(progress=lambda told: steps.append(told.done), should_stop=lambda: bool(steps))
    )
    assert stopped.outcome is Outcome.CANCELLED
    last = checkpoints.read_last(tmp_path / "run" / "steps")
    assert last is not None
    assert last.about["state"]["step"] == stopped.step < WORK.recipe.steps


def test_a_cancelled_task_leaves_nothing_behind(cluster, model, tmp_path):
    async def cancel() -> None:
        training = asyncio.Event()
        group = group_of(model, tmp_path / "run", workers=1, engine="torch")
        run = asyncio.ensure_future(group.run(progress=lambda _: training.set()))
        await asyncio.wait_for(training.wait(), 90)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancel())
    assert is_cleaned_up()


def test_what_the_workers_refuse_reaches_the_caller(undisturbed, model):
    other = replace(WORK, recipe=replace(WORK.recipe, lr=1e-3))
    group = group_of(model, undisturbed.adapter.parent, other, workers=1, engine="torch")
    with pytest.raises(Conflict, match="recipe"):
        asyncio.run(group.run())
    assert is_cleaned_up()


def test_more_than_the_machine_has_room_for_is_told(cluster, model, tmp_path):
    work = replace(WORK, recipe=replace(WORK.recipe, rows=6))
    group = group_of(model, tmp_path / "run", work, workers=3, place_s=1.0)
    with pytest.raises(Unavailable, match="no room for 3 workers"):
        asyncio.run(group.run())
    assert is_cleaned_up()


def test_what_cannot_be_shared_is_refused_before_anything_is_made(model, tmp_path):
    with pytest.raises(BadRequest, match="torch alone"):
        group_of(model, tmp_path / "run", engine="torch")
    with pytest.raises(BadRequest, match="3 workers"):
        group_of(model, tmp_path / "run", workers=3)
