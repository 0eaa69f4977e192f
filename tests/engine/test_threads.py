"""The number of threads follows what the machine gives, without hurting where nothing changes."""

from __future__ import annotations

import time

from forebay_engine.threads import ThreadPolicy, run_queue_wait


class Machine:
    """Steps of 30 ms with two threads and 50 with one; beside a neighbour 90 with two."""

    def __init__(self, current: int = 2) -> None:
        self.now, self.waited = 0.0, 0.0
        self.neighbour = False
        self.policy = ThreadPolicy((1, 2), current, lambda: self.waited, lambda: self.now)

    def step(self, rows: int = 1) -> int:
        threads = self.policy.begin(rows, rows)
        seconds = 0.05 if threads == 1 else 0.09 if self.neighbour else 0.03
        self.now += seconds
        if self.neighbour:
            self.waited += seconds / 2
        self.policy.end(rows, rows)
        return threads

    def steps(self, seconds: float) -> list[int]:
        end = self.now + seconds
        used = []
        while self.now < end:
            used.append(self.step())
        return used


def test_an_undisturbed_machine_sees_no_trials() -> None:
    assert set(Machine().steps(20)) == {2}


def test_beside_a_neighbour_one_thread_computes_and_two_when_it_has_gone() -> None:
    machine = Machine()
    machine.steps(2)
    machine.neighbour = True
    machine.steps(3)
    assert machine.policy.current == 1
    used = machine.steps(30)
    assert used.count(2) / len(used) < 0.1
    machine.neighbour = False
    machine.steps(10)
    assert machine.policy.current == 2


def test_only_steps_alike_are_compared() -> None:
    machine = Machine(current=1)
    for number in range(200):
        machine.step(rows=1 + number % 100)
    assert machine.policy.current == 1
    machine.steps(5)
    assert machine.policy.current == 2


def test_a_single_choice_is_kept() -> None:
    policy = ThreadPolicy((1,), 1, lambda: 0.0)
    assert policy.begin(1, 1) == 1
    policy.end(1, 1)
    assert policy.current == 1


def test_waiting_for_a_core_is_read_from_the_system() -> None:
    before = run_queue_wait()
    time.sleep(0.01)
    assert before <= run_queue_wait()
