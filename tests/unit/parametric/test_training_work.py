"""Training, export and judging as one piece of work that is gone on from wherever it ended."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memcube.errors import BadRequest, Conflict, Corrupt, Unavailable
from memcube.parametric import checkpoints, work
from memcube.parametric.dataset import ProbeKind
from memcube.parametric.gate import Gate
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import Outcome
from memcube.parametric.weights import encode
from memcube.parametric.work import (
    Enough,
    Phase,
    TrainingWork,
    Worked,
    adapter_weights,
    perform,
)
from tests.unit.parametric.small import small_data, small_model

RECIPE = Recipe(
    rank=4,
    alpha=8,
    lr=1e-2,
    steps=6,
    decay_steps=2,
    warmup_steps=1,
    row_tokens=200,
    rows=2,
    replay_tokens=60,
    check_steps=0,
    checkpoint_steps=2,
    autocast=False,
)


def small_work(**changes) -> TrainingWork:
    data = small_data()
    data = replace(data, probes=data.probes[:3], early=data.early[:2])
    return TrainingWork(
        data=data, recipe=replace(RECIPE, **changes), unrelated=("Some text.",), enough=None
    )


def done(folder: Path, given: TrainingWork | None = None, **named) -> Worked:
    return perform(given or small_work(), small_model(), folder, **named)


def tensors(found: Worked) -> dict[str, torch.Tensor]:
    assert found.adapter is not None
    return adapter_weights(found.adapter, base="tiny-0", recipe=RECIPE).tensors()


def same(one: Worked, two: Worked) -> bool:
    a, b = tensors(one), tensors(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Worked:
    return done(tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_outcome_is_an_adapter_that_can_be_published_and_its_report(undisturbed):
    assert (undisturbed.outcome, undisturbed.step) == (Outcome.DONE, 6)
    assert undisturbed.report is not None
    assert len(undisturbed.report.answers) == 3
    weights = adapter_weights(undisturbed.adapter, base="tiny-0", recipe=RECIPE)
    assert len(encode(weights, AdapterLimits())) > 1000
    assert undisturbed.report.adapter_bytes == os.path.getsize(
        undisturbed.adapter / "adapter_model.safetensors"
    )


def test_done_work_is_only_read_again(undisturbed, monkeypatch):
    monkeypatch.setattr(Gate, "judge", lambda *_, **__: pytest.fail("judged again"))
    monkeypatch.setattr(work, "export_adapter", lambda *_: pytest.fail("exported again"))
    again = done(undisturbed.adapter.parent, open_engine=lambda *_: pytest.fail("opened an engine"))
    assert again == undisturbed


def test_other_probes_are_judged_anew_on_the_same_adapter(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.adapter.parent, folder)
    given = small_work()
    fewer = replace(given, data=replace(given.data, probes=given.data.probes[:1]))
    found = done(folder, fewer)
    assert found.report is not None
    assert len(found.report.answers) == 1
    assert same(found, undisturbed)


def test_a_stop_while_training_is_gone_on_from(undisturbed, tmp_path):
    asked = iter([False] * 3 + [True])
    stopped = done(tmp_path / "run", should_stop=lambda: next(asked))
    assert stopped.outcome is Outcome.CANCELLED
    assert (stopped.step, stopped.report, stopped.adapter) == (3, None, None)
    found = done(tmp_path / "run")
    assert same(found, undisturbed)
    assert found.report == undisturbed.report


def test_a_stop_between_probes_leaves_the_judging_alone_to_be_done(undisturbed, tmp_path):
    phases = []
    stopped = done(
        tmp_path / "run",
        progress=lambda told: phases.append(told.phase),
        should_stop=lambda: len(phases) == 6,  # all steps are told
    )
    assert stopped.outcome is Outcome.CANCELLED
    assert Phase.JUDGING not in phases
    seen = []
    found = done(tmp_path / "run", progress=seen.append)
    assert {told.phase for told in seen} == {Phase.JUDGING}
    assert found == replace(undisturbed, adapter=found.adapter)


def test_training_ends_when_the_early_probes_suffice(tmp_path):
    given = replace(
        small_work(steps=20, check_steps=2, first_check=4),
        enough=Enough(recall=0.0, reverse=0.0, leak=1.0),
    )
    seen = []
    assert done(tmp_path / "run", given, progress=seen.append).step == 6
    checks = [told for told in seen if told.phase is Phase.CHECKING]
    assert [(told.done, told.total) for told in checks] == [(0, 2)]
    assert seen[-1].early is not None
    assert ProbeKind.RECALL in seen[-1].early


def test_enough_asks_for_recall_and_bounds_the_leak():
    enough = Enough(recall=0.9, reverse=0.8, leak=0.1)
    assert enough.holds({ProbeKind.RECALL: 0.9})
    assert not enough.holds({})
    assert not enough.holds({ProbeKind.RECALL: 0.9, ProbeKind.REVERSE: 0.7})
    assert not enough.holds({ProbeKind.RECALL: 0.9, ProbeKind.LEAK: 0.2})
    with pytest.raises(BadRequest):
        Enough(recall=95)


def test_two_runs_over_one_folder_are_refused(tmp_path):
    def second(_):
        with pytest.raises(Unavailable, match="another run"):
            done(tmp_path / "run")

    assert done(tmp_path / "run", progress=second).outcome is Outcome.DONE


def test_a_folder_of_other_work_is_refused(undisturbed):
    with pytest.raises(Conflict, match="recipe"):
        done(undisturbed.adapter.parent, small_work(lr=1e-3))


def test_a_damaged_adapter_is_told(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.adapter.parent, folder)
    for report in folder.glob("report-*"):
        report.unlink()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(Corrupt):
        done(folder)


class Killed(BaseException):
    """As a kill: no handler of the code's own runs."""


def killed_at(number: int, monkeypatch, run) -> int:
    """Run, and end at a step of the file system; how many there were."""
    count = 0

    def counted(real):
        def step(*given, **named):
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return real(*given, **named)

        return step

    with monkeypatch.context() as patch:
        for holder, name in (
            (os, "fsync"),
            (os, "replace"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "write_text"),
            (shutil, "rmtree"),
            (checkpoints, "save_file"),
            (work, "export_adapter"),
        ):
            patch.setattr(holder, name, counted(getattr(holder, name)))
        with contextlib.suppress(Killed):
            run()
    return count


def test_killed_at_any_step_of_the_file_system_the_work_ends_as_undisturbed(tmp_path, monkeypatch):
    given = small_work(steps=4, rows=1, row_tokens=60, replay_tokens=20, checkpoint_steps=1)
    given = replace(given, data=replace(given.data, probes=given.data.probes[:1]))
    expected = []
    steps = killed_at(-1, monkeypatch, lambda: expected.append(done(tmp_path / "all", given)))
    for number in range(1, steps + 1, 6):
        folder = tmp_path / str(number)
        killed_at(number, monkeypatch, lambda folder=folder: done(folder, given))
        if (folder / "adapter").exists():
            adapter_weights(folder / "adapter", base="tiny-0", recipe=RECIPE)
        found = done(folder, given)
        assert same(found, expected[0])
        assert found == replace(expected[0], adapter=found.adapter)


def test_killed_at_every_step_of_the_file_system_no_half_folder_is_found(tmp_path, monkeypatch):
    def write(folder: Path) -> None:
        for step in range(1, 6):
            found = {"w": torch.full((3,), float(step))}
            checkpoints.write(folder, step, {"step": step}, found, found)

    steps = killed_at(-1, monkeypatch, lambda: write(tmp_path / "all"))
    assert steps >= 50
    for number in range(1, steps + 1):
        folder = tmp_path / str(number)
        killed_at(number, monkeypatch, lambda folder=folder: write(folder))
        if (last := checkpoints.read_last(folder)) is not None:
            step = last.about["step"]
            assert last.weights["w"].tolist() == last.moments["w"].tolist() == [step] * 3
        write(folder)
        assert sorted(os.listdir(folder)) == ["step-000004", "step-000005"]


PROGRAM = """
import sys
from pathlib import Path
from tests.unit.parametric.test_training_work import done
print("ready", flush=True)
done(Path(sys.argv[1]), progress=lambda told: print(told.done, flush=True))
"""


def test_killed_in_the_middle_it_ends_as_the_undisturbed(undisturbed, tmp_path):
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("3\n", ""):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = []
    found = done(tmp_path / "run", progress=seen.append)
    assert seen[0].done in (3, 4, 5)  # from step 2 or 4 on
    assert same(found, undisturbed)
