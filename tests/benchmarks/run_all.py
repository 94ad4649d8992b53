"""Run all benchmarks one after another, and write the tables of the documentation.

    python tests/benchmarks/run_all.py --data DIR --work DIR [--only p1_training,p4] [--list]

The machine must do nothing else meanwhile: all of it takes five to six hours on two cores. DIR of
``--data`` has the catalogues ``furniture``, ``garments`` and ``groceries``. The folder of
``--work`` keeps what the benchmarks print, and what they make on the way; a benchmark that is run
again continues there. Each one's figures go to docs/benchmarks when it has ended. One that fails is
named at the end, and the figures it had before stay. What only a GPU can measure is left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "benchmarks"
PHOTOS = "--photos {data}/furniture"
CATALOGUES = "furniture={data}/furniture,garments={data}/garments,groceries={data}/groceries"
PACKED = "furniture={work}/q2/furniture/data-0,garments={work}/q2/garments/data-0"
PACKED += ",groceries={work}/q2/groceries/data"
"""What q2_quality has packed: of two catalogues, the first of three folds."""
SYNC = "p4_sync.py --aws {aws} --rclone {rclone} --folder {memory}"

BENCHMARKS = {
    "p1_training": f"p1_training.py {PHOTOS}",
    "p2_frozen": f"p2_frozen.py {PHOTOS}",
    "p3": f"p3_data_path.py {PHOTOS}",
    "p3_synthetic": "p3_data_path.py",
    "p3_stall": f"p3_stall.py {PHOTOS}",
    "p3_index": "p3_index.py",
    "decode_fidelity": f"decode_fidelity.py {PHOTOS}",
    "p4": SYNC,
    "p4_up": f"{SYNC} --tasks small-up,large-up,shards-up",
    "p4_line": f"{SYNC} --tasks shards-line,shards-up-line",
    "p5": "p5_startup.py",
    "p6": "p6_memory.py",
    "p7": "p7_finder.py",
    "p8": "p8_checkpoint.py",
    "retrieval_scale": "retrieval_scale.py",
    "int8": "int8_speed.py",
    "p1_compile": f"p1_compile.py {PHOTOS}",
    "roofline": "roofline.py",
    "budget": "budget_table.py",
    "p9": "p9_scale.py --work {work}/p9",
    "long_captions": "long_captions.py --table {data}/garments/products.csv",
    "q2": f"q2_quality.py --data {CATALOGUES} --out {{work}}/q2",
    "q2_five": f"q2_quality.py --data {CATALOGUES.replace(',garments={data}/garments', '')} "
    "--out {work}/q2 --seeds 5",
    "defaults": f"q3_defaults.py --data {PACKED} --out {{work}}/q3",
    "q4": "q4_tune.py --data {work}/q2/furniture/data-0 --out {work}/q4 "
    "--epochs 3 --max-train-pairs 256",
    "q5": f"q5_preserve.py {PHOTOS} --out {{work}}/q5",
    "q6": "q6_products.py --garments {data}/garments --groceries {data}/groceries --out {work}/q6",
}
"""File of the figures -> command. The quality of models (q) comes last, as it takes longest."""


def run(name: str, places: dict[str, str], work: Path) -> bool:
    """Run one benchmark, and return whether it succeeded. What it prints is kept in ``work``."""
    words = [word.format(**places) for word in BENCHMARKS[name].split()]
    figures = FIGURES / f"{name}.json"
    command = [sys.executable, HERE / words[0], *words[1:], "--json", figures]
    began = time.monotonic()
    print(f"{name}: ", end="", flush=True)
    with (work / f"{name}.txt").open("w", encoding="utf-8") as said:
        code = subprocess.run(command, stdout=said, stderr=said).returncode
    took = (time.monotonic() - began) / 60
    print(f"{took:.1f} min" + (f", failed: see {said.name}" if code else ""), flush=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder of the three catalogues")
    parser.add_argument("--work", type=Path, help="folder for all that is made on the way")
    parser.add_argument("--aws", default=shutil.which("aws"), help="the aws command")
    parser.add_argument("--rclone", default=shutil.which("rclone"), help="the rclone command")
    parser.add_argument("--only", help="names of --list, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the names and end")
    given = parser.parse_args()
    if given.list:
        print(*BENCHMARKS, sep="\n")
        return
    if not (given.data and given.work):
        parser.error("--data and --work are needed")
    names = given.only.split(",") if given.only else list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only {','.join(unknown)}: --list shows the names")
    given.work.mkdir(parents=True, exist_ok=True)
    places = {name: str(getattr(given, name)) for name in ("data", "work", "aws", "rclone")}
    places["memory"] = "/dev/shm" if os.path.isdir("/dev/shm") else str(given.work)
    failed = [name for name in names if not run(name, places, given.work)]
    subprocess.run([sys.executable, HERE / "write_docs.py"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
