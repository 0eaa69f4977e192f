"""Who executes step plans, as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from forebay_engine.sequence import SamplingParams
from forebay_engine.step import StepPlan, StepResult

if TYPE_CHECKING:
    from forebay_engine.cache import CacheGroup
    from forebay_engine.costs import StepCosts


class Launched(Protocol):
    """A step that the device has been given."""

    def result(self) -> StepResult:
        """Wait for the device, and say what came of the step. Asked once."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was done when ``launch`` came back."""

    found: StepResult

    def result(self) -> StepResult:
        return self.found


class StepRunner(Protocol):
    """The model's side of the step contract.

    ``launch`` and ``execute`` are called from one thread. While ``launch`` runs, nobody changes
    what the plan's rows refer to; when it comes back all that the step needs of them is copied.
    Steps run one after the other in the order of their launches: what one writes into the cache the
    next may read, and a page that is given back while steps are under way must not be given away
    before those that were planned with it have told their results.
    """

    cache_groups: tuple[CacheGroup, ...]
    block_size: int
    max_model_len: int
    vocab_size: int
    #: It draws tokens: there is an output layer.
    generates: bool
    eos_token_ids: frozenset[int]
    step_costs: StepCosts
    draft_costs: StepCosts | None
    #: ``launch`` comes back before the device is done, so that the next step can be planned and
    #: launched meanwhile, with rows whose last token is ``unknown``.
    runs_ahead: bool

    def warm_up(self) -> None:
        """Wait for what loading left to do, and run steps until they cost what they will."""
        ...

    def takes_unknown(self, sampling: SamplingParams) -> bool:
        """Whether a token with these parameters can be drawn behind an ``unknown`` one."""
        ...

    def launch(self, plan: StepPlan) -> Launched:
        """Begin a step.

        What it raises leaves the cache's other pages and the sequences' last drawn tokens alone.
        """
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Launch a step and wait for its result."""
        ...
