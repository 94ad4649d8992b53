"""Fuzz one reader of foreign bytes, guided by coverage.

    python tests/fuzz/run.py TARGET [--minutes 10] [--json FILE]

TARGET: tar, index, template, checkpoint, keys (see targets.py). Needs atheris (the extra
``fuzz``). It starts from tests/fuzz/seeds/TARGET and writes what it finds to
tests/fuzz/found/TARGET. Minimize a find and add it to the seeds together with the fix:
tests/fuzz/test_seeds.py runs them all.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = ("tar", "index", "template", "checkpoint", "keys")

FUZZ = """
import sys, atheris
with atheris.instrument_imports(include=["clipft", "tarfile", "zipfile",
                                         "torch._weights_only_unpickler"]):
    import importlib
    module = "checkpoint_target" if sys.argv[1] == "checkpoint" else "targets"
    targets = importlib.import_module("tests.fuzz." + module)
target = targets.TARGETS[sys.argv[1]]
atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
atheris.Fuzz()
"""


def fuzz(name: str, seconds: int) -> dict[str, object]:
    found = HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=8192"]
        options += [f"-artifact_prefix={found}/", "-rss_limit_mb=4096", "-timeout=20"]
        done = subprocess.run(
            [sys.executable, "-c", FUZZ, name, *options, corpus, str(HERE / "seeds" / name)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return {
        "target": name,
        "seconds": seconds,
        "executions": int(stats.get("number_of_executed_units", 0)),
        "edges": int(covered[-1]) if covered else 0,
        "corpus": int(stats.get("new_units_added", 0)),
        "found": done.returncode != 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path, help="file to append a line of figures to")
    given = parser.parse_args()
    result = fuzz(given.target, max(1, round(given.minutes * 60)))
    print(json.dumps(result))
    if given.json:
        with given.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    sys.exit(1 if result["found"] else 0)


if __name__ == "__main__":
    main()
