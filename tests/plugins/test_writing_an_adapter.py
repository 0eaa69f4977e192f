"""The code in docs/writing-an-adapter.md works, as it stands, with pytest alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "writing-an-adapter.md"


def test_the_manuals_adapter_passes_the_contract(tmp_path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL):
        name = re.match(r'"""(\w+\.py)', code)
        assert name is not None, "each block starts with the name of its file"
        (tmp_path / name[1]).write_text(code)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d passed", done.stdout)
    assert "failed" not in done.stdout
