import httpx
import pytest

from memcube.client import calls
from memcube.client.problems import OutcomeUnknown, Unreachable
from memcube.client.retry import Again, Answer, RetryPolicy, Tries
from memcube.errors import (
    BadRequest,
    MemCubeError,
    NotFound,
    StorageFull,
    Unavailable,
    VersionMismatch,
)
from memcube.testing.api import problem

URL = "http://server"
LOST = httpx.ReadTimeout("slow")
REFUSED = httpx.ConnectError("refused")


def tries(call, *, draw=1.0, **policy):
    return Tries(call, RetryPolicy(**policy), URL, now=0.0, draw=lambda: draw)


def test_waits_double_up_to_the_cap_and_are_drawn_from_zero():
    run = tries(calls.search("a"), base_s=1.0, cap_s=4.0, max_tries=9)
    waits = [run.failed(REFUSED, now=0.0).wait_s for _ in range(5)]
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert tries(calls.search("a"), draw=0.0).failed(REFUSED, now=0.0) == Again(0.0)


def test_retry_after_is_the_shortest_wait():
    busy = problem(429, "unavailable", "busy")
    busy.headers["retry-after"] = "7"
    assert tries(calls.search("a")).answered(busy, now=0.0) == Again(7.0)


def test_a_retry_after_beyond_the_deadline_ends_the_call_at_once():
    busy = problem(503, "unavailable", "busy")
    busy.headers["retry-after"] = "60"
    with pytest.raises(Unavailable) as caught:
        tries(calls.search("a"), deadline_s=30.0).answered(busy, now=0.0)
    assert caught.value.retry_after_s == 60


def test_tries_are_bounded():
    run = tries(calls.search("a"), max_tries=2)
    run.failed(LOST, now=0.0)
    with pytest.raises(OutcomeUnknown, match="2 tries"):
        run.failed(LOST, now=0.0)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_keyed_write_is_tried_again_where_an_unkeyed_one_is_not(status):
    failure = problem(status, "unavailable", "busy")
    assert isinstance(tries(calls.add("a")).answered(failure, now=0.0), Again)
    with pytest.raises(Unavailable):
        tries(calls.rollback("1", 1)).answered(failure, now=0.0)


def test_a_500_is_tried_again_where_the_proxy_made_it_and_raised_where_the_system_did():
    proxys = httpx.Response(
        500, headers={"content-type": "text/plain"}, text="Internal Server Error"
    )
    assert tries(calls.add("a"), draw=0.0).answered(proxys, now=0.0) == Again(2.0)
    with pytest.raises(Unavailable, match="HTTP 500"):
        tries(calls.rollback("1", 1)).answered(proxys, now=0.0)
    with pytest.raises(MemCubeError, match="a defect"):
        tries(calls.add("a")).answered(problem(500, "internal", "a defect"), now=0.0)


def test_an_unkeyed_write_is_tried_again_only_when_nothing_was_done():
    assert isinstance(tries(calls.archive("1")).failed(REFUSED, now=0.0), Again)
    busy = problem(429, "unavailable", "busy")
    assert isinstance(tries(calls.archive("1")).answered(busy, now=0.0), Again)
    with pytest.raises(OutcomeUnknown, match="look before"):
        tries(calls.archive("1")).failed(LOST, now=0.0)


def test_an_update_is_repeated_only_with_an_expected_version():
    assert isinstance(
        tries(calls.update("1", text="a", expected_version=3)).failed(LOST, now=0), Again
    )
    with pytest.raises(OutcomeUnknown):
        tries(calls.update("1", text="a")).failed(LOST, now=0)


def test_a_delete_that_finds_nothing_after_an_unknown_outcome_has_succeeded():
    gone = problem(404, "not_found", "no cube '1'")
    run = tries(calls.delete("1"))
    run.failed(LOST, now=0.0)
    answer = run.answered(gone, now=0.0)
    assert isinstance(answer, Answer)
    assert answer.value.id == "1"


@pytest.mark.parametrize("before", [None, REFUSED])
def test_a_delete_that_finds_nothing_otherwise_is_not_found(before):
    run = tries(calls.delete("1"))
    if before is not None:
        run.failed(before, now=0.0)
    with pytest.raises(NotFound):
        run.answered(problem(404, "not_found", "no cube '1'"), now=0.0)


def test_a_full_disk_is_not_asked_again():
    with pytest.raises(StorageFull):
        tries(calls.add("a")).answered(problem(507, "storage_full", "no space left"), now=0.0)


def test_a_probe_is_asked_once_and_503_is_its_answer():
    assert tries(calls.ready()).answered(httpx.Response(503), now=0.0) == Answer(False)
    assert tries(calls.ready()).answered(httpx.Response(200, text="ok"), now=0.0) == Answer(True)
    with pytest.raises(Unreachable, match="memcube serve"):
        tries(calls.ready()).failed(REFUSED, now=0.0)


def test_an_error_has_the_servers_words_its_fields_and_the_request_id():
    response = problem(409, "version_mismatch", "cube is at 4", expected=3, current=4)
    with pytest.raises(VersionMismatch, match=r"cube is at 4 \(request req-1\)") as caught:
        tries(calls.get("1")).answered(response, now=0.0)
    assert caught.value.current == 4


def test_an_error_without_a_problem_body_goes_by_its_status():
    with pytest.raises(NotFound, match="nothing here"):
        tries(calls.get("1")).answered(httpx.Response(404, text="nothing here"), now=0.0)


def test_every_error_status_is_an_error_of_the_tree():
    for status in range(400, 600):
        run = tries(calls.get("1"), max_tries=1)
        with pytest.raises(MemCubeError):
            run.answered(httpx.Response(status), now=0.0)


def test_a_policy_that_never_tries_is_refused():
    with pytest.raises(BadRequest):
        RetryPolicy(max_tries=0)
