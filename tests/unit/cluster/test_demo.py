"""The tour's sample, and how it ends when something is not as expected. The tour itself: integration."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster import demo
from memcube.client import Message
from memcube.ingest import make_plan, read_file


class BrokenSystem:
    """A system that does not start."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.stopped = False

    def start(self) -> None:
        raise RuntimeError("the system did not start: no room")

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def broken(tmp_path: Path) -> BrokenSystem:
    return BrokenSystem(tmp_path / "data")


def messages() -> list[Message]:
    said = [m for record in read_file(demo.SAMPLE).records for m in record.item.messages or ()]
    return [message for message in said if isinstance(message, Message)]


def test_the_sample_is_a_conversation_of_two_over_several_days():
    said = messages()
    assert len(said) == 40
    assert {message.name for message in said} == {"Ines", "Tobias"}
    times = [message.time for message in said if message.time is not None]
    assert len({time.date() for time in times}) == 5
    assert times == sorted(times)


def test_each_day_of_the_sample_is_a_run_that_keeps_its_order():
    reading = read_file(demo.SAMPLE)
    assert reading.format == "jsonl"
    lanes = [record.lane for record in reading.records]
    assert len(set(lanes)) == 5
    assert make_plan(reading).num_items == 40


def test_every_question_has_its_turn_in_the_sample():
    turns = {message.id for message in messages()}
    assert {turn for _, turn in demo.ASKED} <= turns


def test_a_step_that_fails_ends_the_tour_and_stops_the_system(broken: BrokenSystem):
    out = io.StringIO()
    tour = demo.Tour(broken, console=Console(file=out, width=200))  # type: ignore[arg-type]
    assert demo.run(tour) is False
    assert broken.stopped
    assert "not as expected: the system did not start: no room" in out.getvalue()


def test_a_tour_that_failed_exits_with_1_and_leaves_its_folder(
    broken: BrokenSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = broken.data_dir.parent / "demo"
    folder.mkdir()
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(folder))
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo, "SystemProcess", BrokenSystem)
    assert demo.main([]) == 1
    assert folder.exists()
    assert "are left in" in capsys.readouterr().out


def test_what_was_not_expected_names_it():
    demo.expect(True, "all is well")
    with pytest.raises(demo.Unexpected, match="a hit is missing"):
        demo.expect(False, "a hit is missing")
