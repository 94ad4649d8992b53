"""``ablation.json``: the runs of an ablation and how each of them ended, as plain values."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipft.core.errors import UsageError
from clipft.core.files import write_text
from clipft.config.settings import Settings
from clipft.ablation.grid import PlannedRun, settings_in_common
from clipft.ablation.runner import Outcome
from clipft.training.run_reading import read_run

STATE = "ablation.json"


def write_state(folder: Path, runs: Sequence[PlannedRun], ended: Mapping[Path, Outcome]) -> None:
    """``ended`` is by the run's folder; a run that is neither in it nor finished waits."""
    standard = Settings().model_dump(mode="json")
    common = settings_in_common(runs)
    content = {
        "format_version": 1,
        "settings": [
            {"name": n, "value": v, "default": standard[n], "changed": v != standard[n]}
            for n, v in common.items()
        ],
        "runs": [_entry(folder, run, ended.get(run.folder)) for run in runs],
    }
    write_text(folder / STATE, json.dumps(content, indent=1) + "\n")


def _entry(folder: Path, run: PlannedRun, outcome: Outcome | None) -> dict[str, Any]:
    failed = outcome is not None and outcome.exit_code != 0
    return {
        "variant": run.variant,
        "scenario": run.settings.values.scenario,
        "varied": run.varied,
        "seed": run.seed,
        "folder": str(run.folder.relative_to(folder.resolve())),
        "state": "finished" if run.finished else "failed" if failed else "waiting",
        "exit_code": outcome.exit_code if outcome and failed else None,
        "error": outcome.error if outcome and failed else None,
        "hint": outcome.hint if outcome and failed else None,
    }


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``ablation.json``, each run with what it left: ``before`` and ``after``
    (retrieval; None: no epoch was better), ``epochs``, ``plan``, time and memory.

    Raises:
        UsageError: no ablation is there, or its files are not clipft's.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        runs = state["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no ablation in {folder}", "name the folder of one") from error
    for run in runs:
        run |= _left(folder / run["folder"]) if run["state"] == "finished" else {}
    return state


def _left(folder: Path) -> dict[str, Any]:
    records = read_run(folder)
    assert records.result
    kept = ("before", "after", "best_epoch", "steps", "stopped_early", "skipped_pairs")
    return {
        **{name: records.result[name] for name in kept},
        "epochs": records.epochs,
        "evaluation": records.evaluation,
        "plan": records.run.get("plan"),
        "environment": records.run.get("environment", {}),
        "seconds": records.run.get("seconds"),
        "peak_memory_bytes": records.run.get("peak_memory_bytes"),
    }
