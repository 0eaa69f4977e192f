from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from forebay.api import Decision, Identity, Outcome
from forebay.telemetry.decisions import DecisionStore


def decision(request_id: str, outcome: Outcome | None = None) -> Decision:
    return Decision(
        request_id=request_id,
        time=1.0,
        endpoint="chat",
        model="m",
        identity=Identity(),
        policy="p",
        policy_version="1",
        seed=0,
        candidates=(),
        order=(),
        outcome=outcome,
    )


def test_the_finished_record_takes_the_place_of_the_started_one() -> None:
    store = DecisionStore(2)
    started = decision("a")
    store.put(started)
    store.put(decision("b"))
    finished = structs.replace(started, outcome=Outcome(result="ok"))
    store.put(finished)
    assert store.get("a") is finished
    assert [d.request_id for d in store.recent(10)] == ["a", "b"]
    store.put(decision("c"))
    assert store.get("b") is None
    assert store.get("a") is finished


@given(capacity=st.integers(0, 5), ids=st.lists(st.sampled_from("abcdefgh")), n=st.integers(-1, 9))
def test_it_keeps_the_latest(capacity: int, ids: list[str], n: int) -> None:
    store = DecisionStore(capacity)
    for request_id in ids:
        store.put(decision(request_id))
    newest_first = list(dict.fromkeys(reversed(ids)))[:capacity]
    assert [d.request_id for d in store.recent(n)] == newest_first[: max(0, n)]
    for request_id in "abcdefgh":
        assert (store.get(request_id) is not None) == (request_id in newest_first)
