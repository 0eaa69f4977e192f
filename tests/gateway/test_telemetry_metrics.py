from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from forebay.api import AttemptRecord, Decision, Distribution, Identity, Load, Outcome, Usage
from forebay.telemetry.metrics import FleetRow, Metrics

DOC = Path(__file__).parents[2] / "docs" / "observability.md"


def decision(
    outcome: Outcome, *attempts: AttemptRecord, model: str = "gemma", endpoint: str = "chat"
) -> Decision:
    return Decision(
        request_id="r",
        time=1.0,
        endpoint=endpoint,
        model=model,
        identity=Identity(),
        policy="p",
        policy_version="1",
        seed=0,
        candidates=(),
        order=(),
        attempts=attempts,
        outcome=outcome,
    )


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample that is not zero, as ``name{label=value,…}``, buckets left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.value and not sample.name.endswith("_bucket"):
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return {k: v for k, v in found.items() if not k.startswith(("process_", "forebay_build"))}


ANSWERED = Outcome(
    result="ok",
    queue=0.5,
    ttft=1.0,
    duration=4.0,
    overhead=0.002,
    usage=Usage(prompt_tokens=100, completion_tokens=61, cached_tokens=64),
    finish_reasons=("stop",),
)
FAILED = AttemptRecord("a", 0.0, 0.1, "connect_failed")
SERVED = AttemptRecord("b", 0.1, 3.9)


def test_an_answered_stream() -> None:
    metrics = Metrics(["gemma"])
    metrics.attempt("a", "connect_failed")
    metrics.attempt("b", None)
    metrics.finished(decision(ANSWERED, FAILED, SERVED), stream=True)
    on_b = "backend=b,model=gemma"
    assert samples(metrics) == {
        "forebay_requests_total{endpoint=chat,model=gemma,outcome=ok,stream=true}": 1,
        "forebay_attempts_total{backend=a,result=connect_failed}": 1,
        "forebay_attempts_total{backend=b,result=ok}": 1,
        "forebay_retries_total{model=gemma}": 1,
        "forebay_tokens_total{backend=b,direction=input,model=gemma,source=reported}": 100,
        "forebay_tokens_total{backend=b,direction=output,model=gemma,source=reported}": 61,
        f"forebay_cached_tokens_total{{{on_b}}}": 64,
        f"forebay_request_duration_seconds_count{{{on_b}}}": 1,
        f"forebay_request_duration_seconds_sum{{{on_b}}}": 4,
        f"forebay_time_to_first_token_seconds_count{{{on_b}}}": 1,
        f"forebay_time_to_first_token_seconds_sum{{{on_b}}}": 1,
        f"forebay_time_per_output_token_seconds_count{{{on_b}}}": 1,
        f"forebay_time_per_output_token_seconds_sum{{{on_b}}}": 3 / 60,
        "forebay_overhead_seconds_count{}": 1,
        "forebay_overhead_seconds_sum{}": 0.002,
        "forebay_queue_wait_seconds_count{model=gemma}": 1,
        "forebay_queue_wait_seconds_sum{model=gemma}": 0.5,
    }


def test_choices_side_by_side_share_the_tokens() -> None:
    metrics = Metrics(["gemma"])
    outcome = structs.replace(ANSWERED, finish_reasons=("stop", "length"))
    outcome = structs.replace(outcome, usage=Usage(10, 62))
    metrics.finished(decision(outcome, SERVED), stream=True)
    total = samples(metrics)["forebay_time_per_output_token_seconds_sum{backend=b,model=gemma}"]
    assert total == pytest.approx(3 / 30)


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_has_no_time_per_further_token(tokens: int) -> None:
    metrics = Metrics(["gemma"])
    outcome = structs.replace(ANSWERED, usage=Usage(10, tokens))
    metrics.finished(decision(outcome, SERVED), stream=True)
    assert not [name for name in samples(metrics) if "per_output_token" in name]


def test_an_answer_in_one_piece_has_no_first_token() -> None:
    metrics = Metrics(["gemma"])
    metrics.finished(decision(ANSWERED, SERVED), stream=False)
    found = samples(metrics)
    assert found["forebay_requests_total{endpoint=chat,model=gemma,outcome=ok,stream=false}"] == 1
    assert found["forebay_request_duration_seconds_count{backend=b,model=gemma}"] == 1
    assert not [name for name in found if "first_token" in name or "per_output" in name]


def test_latency_is_that_of_answers_and_not_of_failures() -> None:
    metrics = Metrics(["gemma"])
    outcome = structs.replace(ANSWERED, result="truncated", usage=Usage(7, 3, source="counted"))
    metrics.finished(decision(outcome, SERVED), stream=True)
    found = samples(metrics)
    assert not [name for name in found if "duration" in name or "token_seconds" in name]
    assert found["forebay_tokens_total{backend=b,direction=output,model=gemma,source=counted}"] == 3


@pytest.mark.parametrize(
    ("outcome", "attempts", "phase"),
    [
        (Outcome(result="client_disconnect"), (), "queue"),
        (Outcome(result="client_disconnect"), (FAILED,), "prefill"),
        (Outcome(result="client_disconnect", ttft=0.1), (FAILED,), "stream"),
    ],
)
def test_when_clients_leave(
    outcome: Outcome, attempts: tuple[AttemptRecord, ...], phase: str
) -> None:
    metrics = Metrics(["gemma"])
    metrics.finished(decision(outcome, *attempts), stream=True)
    assert samples(metrics)[f"forebay_client_disconnects_total{{phase={phase}}}"] == 1


def test_no_client_can_make_new_series() -> None:
    metrics = Metrics(["gemma"])
    metrics.finished(decision(ANSWERED, SERVED), stream=True)
    metrics.finished(decision(ANSWERED, SERVED, model="x0"), stream=True)
    before = len(metrics.render().splitlines())
    for number in range(50):
        metrics.finished(decision(ANSWERED, SERVED, model=f"x{number}\n"), stream=True)
    assert len(metrics.render().splitlines()) == before
    unknown = "forebay_requests_total{endpoint=chat,model=_unknown,outcome=ok,stream=true}"
    assert samples(metrics)[unknown] == 51


def test_a_request_without_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="r has no outcome"):
        Metrics([]).finished(structs.replace(decision(ANSWERED), outcome=None), stream=True)


def test_refusals_before_routing() -> None:
    metrics = Metrics([])
    metrics.refused("chat", "model_not_found")
    assert samples(metrics) == {"forebay_refused_total{endpoint=chat,error=model_not_found}": 1}


def test_the_fleet_is_read_at_each_scrape() -> None:
    rows = [
        FleetRow(
            backend="a",
            in_flight=3,
            healthy=True,
            running=2,
            waiting=5,
            kv_usage=0.25,
            load_age=1.5,
        ),
        FleetRow(backend="b"),
    ]
    depths = {"gemma": 4}
    metrics = Metrics(["gemma"])
    metrics.watch_fleet(lambda: iter(rows))
    metrics.watch_queues(lambda: depths)
    expected = {
        "forebay_in_flight{backend=a}": 3,
        "forebay_backend_healthy{backend=a}": 1,
        "forebay_backend_running{backend=a}": 2,
        "forebay_backend_waiting{backend=a}": 5,
        "forebay_backend_kv_usage_ratio{backend=a}": 0.25,
        "forebay_backend_load_age_seconds{backend=a}": 1.5,
        "forebay_queue_depth{model=gemma}": 4,
    }
    assert samples(metrics) == expected
    text = metrics.render().decode()
    assert 'forebay_backend_healthy{backend="b"} 0.0' in text
    assert 'forebay_backend_running{backend="b"}' not in text
    rows.clear()
    depths["gemma"] = 9
    assert samples(metrics) == {"forebay_queue_depth{model=gemma}": 9}


def test_two_gateways_in_one_process_do_not_share_counts() -> None:
    one, other = Metrics(["gemma"]), Metrics(["gemma"])
    one.attempt("a", None)
    assert samples(other) == {}


def complete() -> Metrics:
    """Metrics with everything watched, so that every family is there."""
    metrics = Metrics(["gemma"])
    metrics.watch_fleet(lambda: [FleetRow(backend="a")])
    metrics.watch_queues(lambda: {"gemma": 0})
    metrics.watch_spans(lambda: {"dropped": 1})
    metrics.watch_observers(lambda: {"Observer": 1}, lambda: {"started": 1})
    return metrics


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    exposed = set()
    for family in complete().registry.collect():
        exposed.add(f"{family.name}_total" if family.type == "counter" else family.name)
    documented = set(re.findall(r"^\| `((?:forebay|process)_[a-z_]+)`", DOC.read_text(), re.M))
    # What a process says of itself depends on the platform; ours are exact. What engines tell of
    # themselves is compared where they are.
    assert exposed <= documented
    ours = {name for name in documented if name.startswith("forebay_")}
    assert {name for name in ours if not name.startswith("forebay_engine_")} <= exposed


def test_figures_of_engines_are_shown_under_their_own_names() -> None:
    times = Distribution((0.5, 2.0), (3, 0, 1), 9.5)
    figures = Load(
        counters={"preemptions": 7}, gauges={"odd name!": 0.5}, distributions={"wait": times}
    )
    metrics = Metrics([])
    metrics.watch_fleet(lambda: [FleetRow(backend=name, figures=figures) for name in "ab"])
    found = samples(metrics)
    for backend in "ab":
        assert found[f"forebay_engine_preemptions_total{{backend={backend}}}"] == 7
        assert found[f"forebay_engine_odd_name_{{backend={backend}}}"] == 0.5
        assert found[f"forebay_engine_wait_sum{{backend={backend}}}"] == 9.5
        assert found[f"forebay_engine_wait_count{{backend={backend}}}"] == 4
    text = metrics.render().decode()
    for bound, count in (("0.5", 3), ("2.0", 3), ("+Inf", 4)):
        assert f'forebay_engine_wait_bucket{{backend="a",le="{bound}"}} {count}.0' in text


def test_spans_and_observers_are_shown() -> None:
    assert samples(complete()).items() >= {
        ("forebay_spans_total{result=dropped}", 1.0),
        ("forebay_observer_failures_total{observer=Observer}", 1.0),
        ("forebay_observer_dropped_events_total{event=started}", 1.0),
    }
