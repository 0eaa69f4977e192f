"""What was found of a backend's claims, and which of them are put to the test."""

from __future__ import annotations

import time
from typing import Literal

from msgspec import Struct

from forebay.api import Capabilities

__all__ = ["Examination", "Finding", "Question", "Verdict", "questions"]

Question = Literal["usage", "stop", "schema", "completions_schema", "tools", "logprobs", "cancel"]
Verdict = Literal["holds", "fails", "unknown"]


class Finding(Struct, frozen=True):
    """The answer to one question; ``unknown``: it could not be told."""

    verdict: Verdict
    #: For operators, who may see what a backend said; empty where nothing is to be said.
    reason: str = ""
    #: It was the moment, not the backend's nature: worth asking again.
    again: bool = False


class Examination(Struct, frozen=True, kw_only=True):
    """All that was asked of one version of a backend."""

    version: str
    #: Unix seconds at which it began.
    began: float
    #: From then to the last answer.
    seconds: float = 0.0
    #: Not answered yet.
    pending: tuple[Question, ...] = ()
    findings: dict[Question, Finding] = {}

    def with_finding(self, question: Question, finding: Finding) -> Examination:
        return Examination(
            version=self.version,
            began=self.began,
            seconds=time.time() - self.began,
            pending=tuple(each for each in self.pending if each != question),
            findings={**self.findings, question: finding},
        )


def questions(claims: Capabilities) -> tuple[Question, ...]:
    """What to ask of a backend that claims this; nothing if it generates no text."""
    if not claims.endpoints & {"chat", "completions"}:
        return ()
    claimed: dict[Question, bool] = {
        "usage": True,
        "stop": claims.stop,
        "schema": claims.schema and "chat" in claims.endpoints,
        # Some servers know `response_format` in chats alone, and ignore it elsewhere.
        "completions_schema": claims.schema and "completions" in claims.endpoints,
        "tools": claims.tools and "chat" in claims.endpoints,
        "logprobs": claims.logprobs,
        "cancel": True,
    }
    return tuple(question for question, so in claimed.items() if so)
