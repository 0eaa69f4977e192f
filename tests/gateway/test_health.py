"""The health state machine, with a clock that tests set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.config import Health as Settings
from forebay.health import Health


def healthy(**settings: float) -> Health:
    health = Health(Settings(**settings))
    health.probe_ok()
    return health


def test_it_starts_and_is_healthy_with_its_first_good_probe() -> None:
    health = Health(Settings())
    assert health.state(0) == "starting"
    health.probe_failed("loading", loading=True)
    assert health.state(0) == "starting"
    health.probe_failed("connection refused")
    assert health.state(0) == "unhealthy"
    health.probe_ok()
    assert health.state(0) == "healthy"
    assert health.reason is None


def test_one_failed_probe_is_forgiven_two_are_not() -> None:
    health = healthy()
    health.probe_failed("slow")
    assert health.state(0) == "healthy"
    health.probe_failed("slow again")
    assert (health.state(0), health.reason) == ("unhealthy", "slow again")
    health.probe_ok()
    assert health.state(0) == "healthy"


def test_consecutive_failures_eject_and_each_ejection_lasts_longer() -> None:
    health = healthy(failures=3, ejection=5, ejection_max=12)
    health.failed(0, "x")
    health.failed(0, "x")
    health.succeeded()
    health.failed(0, "x")
    health.failed(0, "x")
    assert health.state(0) == "healthy", "a success in between starts the count anew"
    health.failed(0, "x")
    assert health.state(4.9) == "ejected"
    for now, until in ((5.0, 15.0), (15.0, 27.0), (27.0, 39.0)):
        assert health.state(now) == "healthy", "one trial is let through"
        health.began()
        assert health.state(now) == "ejected", "only one"
        health.failed(now, "still")
        assert health.state(until - 0.1) == "ejected"
        assert health.state(until) == "healthy"


def test_a_good_trial_ends_the_ejections() -> None:
    health = healthy(failures=1, ejection=5)
    health.failed(0, "x")
    health.began()
    health.succeeded()
    assert (health.state(5), health.reason) == ("healthy", None)
    health.failed(6, "x")
    assert health.state(10.9) == "ejected"
    assert health.state(11) == "healthy", "the first rest again, not the doubled one"


def test_a_trial_that_says_nothing_leaves_room_for_another() -> None:
    health = healthy(failures=1, ejection=5)
    health.failed(0, "x")
    health.began()
    health.inconclusive()
    assert health.state(5) == "healthy"


def test_zero_failures_never_eject() -> None:
    health = healthy(failures=0)
    for _ in range(1000):
        health.failed(0, "x")
    assert health.state(0) == "healthy"


def test_busy_fades_and_cannot_be_claimed_for_long() -> None:
    health = healthy()
    health.said_busy(0, None)
    assert health.busy(0.9)
    assert not health.busy(1)
    health.said_busy(0, 3600)
    assert health.busy(9.9)
    assert not health.busy(10)
    assert health.state(0) == "healthy"


def test_draining_beats_everything() -> None:
    health = healthy()
    health.draining = True
    assert health.state(0) == "draining"


@given(st.lists(st.sampled_from(["began", "succeeded", "failed", "inconclusive", "busy"])))
def test_whatever_happens_it_comes_back(events: list[str]) -> None:
    health = healthy(failures=2, ejection=1, ejection_max=8)
    now = 0.0
    in_flight = 0
    for event in events:
        now += 0.25
        if event == "began":
            in_flight += health.state(now) == "healthy"
            if health.state(now) == "healthy":
                health.began()
        elif in_flight:
            in_flight -= 1
            if event == "succeeded":
                health.succeeded()
            elif event == "failed":
                health.failed(now, "x")
            elif event == "busy":
                health.said_busy(now, 1)
            else:
                health.inconclusive()
    while in_flight:
        in_flight -= 1
        health.inconclusive()
    assert health.state(now + 8) == "healthy"
