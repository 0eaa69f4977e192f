"""The engine's real process and model, running ahead: a step is computed when its result is due.

Run as a program in place of ``python -m forebay_engine.process``.
"""

from __future__ import annotations

from forebay_engine.process import load_runner, main
from late_runner import LateRunner

if __name__ == "__main__":
    main(lambda config, progress: LateRunner(load_runner(config, progress)))
