"""The conformance kit: what clients are promised, and whether a backend behind Forebay keeps it.

``await examine(Subject(adapter="vllm", target="http://..."), load_plugins())`` gives a report;
``forebay conformance`` shows one. See ``docs/conformance.md``.
"""

from forebay.conformance.answer import Answer, Broken, Lacking
from forebay.conformance.check import Check, check
from forebay.conformance.checks import CHECKS
from forebay.conformance.judging import examine
from forebay.conformance.report import Report, Result, Verdict, markdown, remarks
from forebay.conformance.subject import Subject
from forebay.conformance.talk import Talk

__all__ = [
    "CHECKS",
    "Answer",
    "Broken",
    "Check",
    "Lacking",
    "Report",
    "Result",
    "Subject",
    "Talk",
    "Verdict",
    "check",
    "examine",
    "markdown",
    "remarks",
]
