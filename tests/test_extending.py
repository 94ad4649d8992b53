"""Every block of docs/extending.md works on a copy of the package."""

import re
import shutil
import sys
from pathlib import Path

from tests import warm
from tests.documents import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
DIFF = re.compile(r"^```diff\n--- (\S+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"^<!-- file (\S+) -->\n```python\n(.*?)^```$", re.M | re.S)

TEST_THE_COPY = """
import os, sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("clipft", "tests")]:
    del sys.modules[name]
sys.path.insert(0, os.getcwd())
import clipft, pytest
assert clipft.__file__.startswith(os.getcwd())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests"]))
"""


def apply(folder: Path, file: str, change: str) -> None:
    """Apply a diff. The lines marked by a space or - must be in the file exactly once."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file}: not exactly once in the file:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_examples_work(tmp_path):
    shutil.copytree(ROOT / "clipft", tmp_path / "clipft", ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "tests").mkdir()
    for helper in ("__init__.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / helper, tmp_path / "tests" / helper)
    changes, files = DIFF.findall(PAGE), FILE.findall(PAGE)
    assert (len(changes), len(files)) == (6, 3)
    for file, change in changes:
        apply(tmp_path, file, change)
    for file, text in files:
        (tmp_path / file).write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", TEST_THE_COPY]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "7 passed" in done.stdout, done.stdout[-500:]
