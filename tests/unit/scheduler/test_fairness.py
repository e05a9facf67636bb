"""Whose move is next."""

from dataclasses import dataclass

from memcube.scheduler.fairness import Bucket, FairQueue


@dataclass(frozen=True)
class Move:
    id: str
    tenant: str
    num_bytes: int = 10
    urgent: bool = False


def take_all(queue: FairQueue[Move]) -> list[str]:
    found = []
    while (move := queue.pop(lambda _: True)) is not None:
        found.append(move.id)
    return found


def test_tenants_get_equal_bytes_not_equal_moves():
    queue: FairQueue[Move] = FairQueue(quantum_bytes=100)
    for n in range(20):
        queue.put(Move(f"a{n}", "a", 10))
    for n in range(20):
        queue.put(Move(f"b{n}", "b", 100))
    first = take_all(queue)[:22]
    bytes_of = {t: sum(10 if t == "a" else 100 for id in first if id[0] == t) for t in "ab"}
    assert abs(bytes_of["a"] - bytes_of["b"]) <= 100


def test_what_a_request_waits_for_comes_first():
    queue: FairQueue[Move] = FairQueue()
    queue.put(Move("slow", "a"))
    queue.put(Move("now", "b", urgent=True))
    assert take_all(queue) == ["now", "slow"]


def test_a_move_that_may_not_start_lets_others_go_first():
    queue: FairQueue[Move] = FairQueue()
    for move in (Move("a1", "a"), Move("a2", "a"), Move("b1", "b")):
        queue.put(move)
    got = [queue.pop(lambda m: m.id != "a1") for _ in range(3)]
    assert [move and move.id for move in got] == ["a2", "b1", None]
    assert take_all(queue) == ["a1"]


def test_the_same_move_waits_once():
    queue: FairQueue[Move] = FairQueue()
    for _ in range(2):
        queue.put(Move("a", "a"))
    assert len(queue) == 1
    assert take_all(queue) == ["a"]


def test_a_move_larger_than_the_quantum_gets_its_turn():
    queue: FairQueue[Move] = FairQueue(quantum_bytes=1)
    queue.put(Move("large", "a", 1_000))
    queue.put(Move("small", "b", 1))
    assert take_all(queue) == ["small", "large"]


def test_a_bucket_lets_its_rate_through_and_no_move_is_too_large_for_it():
    bucket = Bucket(100.0, 50.0, now=0.0)
    taken, now = 0, 0.0
    while now < 10.0:
        if bucket.is_open(now):
            bucket.take(200)
            taken += 200
        now += 0.1
    assert 1_000 <= taken <= 1_300
    assert bucket.opens_in_s() >= 0.0


def test_a_clock_that_goes_back_fills_no_bucket():
    bucket = Bucket(1.0, 10.0, now=100.0)
    bucket.take(10)
    assert not bucket.is_open(100.0)
    assert not bucket.is_open(50.0)
    assert not bucket.is_open(100.0)
    assert bucket.is_open(101.0)
