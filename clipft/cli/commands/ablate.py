"""``clipft ablate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipft.cli.console import Output, end, print_error
from clipft.cli.options import settings_command
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.config.sources import LoadedSettings, read_toml, refuse_unknown
from clipft.core.common import counted
from clipft.core.errors import Interrupted, RunsFailed, UsageError

if TYPE_CHECKING:
    from clipft.ablation.grid import Grid, PlannedRun
    from clipft.ablation.runner import Outcome

_NO_OPTIONS = {"scenario", "seed", "resume_from_checkpoint", "enable_s3_checkpoints"}
"""Settings that an ablation decides itself."""

_TABLE = "ablate"
_PANEL = "Ablation"
_SEEDS = "1,2,3"

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE",
        help="TOML with settings, and a table [ablate] with scenarios, seeds, jobs and set",
        show_default=False,
    ),
]
Scenarios = Annotated[
    str | None,
    typer.Option(
        "--scenarios",
        metavar="A,B",
        help="Scenarios, with commas between [default: all]",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N",
        help=f"Seeds, with commas between [default: {_SEEDS}]",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=A,B",
        help="A setting and the values it is given in turn; may be repeated",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        metavar="N",
        help="Runs beside each other; several GPUs are taken in turn [default: 1]",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


@settings_command(*(name for name in Settings.model_fields if name not in _NO_OPTIONS))
def ablate(
    loaded: LoadedSettings,
    out: Output,
    file: File = None,
    scenarios: Scenarios = None,
    seeds: Seeds = None,
    set_: Set = None,
    jobs: Jobs = None,
) -> None:
    """Run scenarios x settings x seeds, and show which to take.

    Every run is one of `clipft train`, in a process and a folder of its own under --output-dir.
    Run the same command again to go on after a stop, or to try failed runs again; with more
    scenarios, seeds or values only what is new is run. Exit code 8: some runs failed.

    Examples:

        clipft ablate --data-dir ./catalogue --output-dir ./ablation
        clipft ablate --scenarios dual_lora --set lr=1e-4,1e-3 --set lora_r=8,16
        clipft ablate ablation.toml --jobs 2
    """
    from clipft.ablation.grid import check_same_ablation, plan_runs

    given = read_toml(file) if file else {}
    own = _own_table(given.pop(_TABLE, {}), file)
    refuse_unknown(given, file or "")
    base = given | {n: getattr(loaded.values, n) for n, o in loaded.origins.items() if _set(o)}
    folder = Path(base.get("output_dir", loaded.values.output_dir))
    flags = {"scenarios": scenarios, "seeds": seeds, "set": _varied(set_) if set_ else None}
    own |= {name: value for name, value in flags.items() if value is not None}
    runs = plan_runs(_grid(own), base, folder)
    check_same_ablation(runs)
    _sync_once(runs, out)
    ended = _run(runs, folder, jobs or _jobs(own), out)
    failed = [outcome for outcome in ended if outcome.exit_code]
    if failed:
        first = failed[0]
        error = RunsFailed(
            f"{len(failed)} of {counted(len(runs), 'run')} failed, first {first.run.variant} seed "
            f"{first.run.seed} with exit code {first.exit_code}: {first.error}",
            first.hint,
        )
        print_error(error, as_json=False)  # stdout has the table already
        raise typer.Exit(error.exit_code)


def _ending(outcome: "Outcome") -> str:
    if outcome.exit_code:
        return f"failed with exit code {outcome.exit_code}: {outcome.error}"
    from clipft.metrics.figures import mean_recall
    from clipft.runs.folder import read_run

    result = read_run(outcome.run.folder).result or {}
    return f"mean recall {mean_recall(result['after'] or result['before']):.1%}"


def _best(content: dict[str, Any], folder: Path) -> tuple[object, ...]:
    """To look closer at the best run of the variant with the most recall over its seeds."""
    from clipft.metrics.figures import mean_recall

    means = {v["name"]: v["mean_recall"] for v in content["variants"] if v["mean_recall"]}
    found = [run for run in content["runs"] if run["after"] and run["variant"] in means]
    if not found:
        return ()

    def rank(run: dict[str, Any]) -> tuple[float, float]:
        return means[run["variant"]]["mean"], mean_recall(run["after"])

    return ("evaluate", folder / max(found, key=rank)["folder"])


def _set(origin: str) -> bool:
    """By the user, not by a default or a profile."""
    return origin in {"flag", "environment"} or origin.startswith("file ")


def _own_table(table: Any, file: Path | None) -> dict[str, Any]:
    known = {"scenarios", "seeds", "set", "jobs"}
    if not isinstance(table, dict) or not table.keys() <= known:
        raise UsageError(
            f"[{_TABLE}] in {file} holds other names than {', '.join(sorted(known))}",
            'for example: [ablate] / scenarios = ["dual_lora"] / seeds = [1, 2] / '
            "set = { lr = [1e-4, 1e-3] }",
        )
    return dict(table)


def _grid(own: dict[str, Any]) -> "Grid":
    from clipft.ablation.grid import Grid

    varied = own.get("set", {})
    if not isinstance(varied, dict):
        raise UsageError("set is not a table of settings", "write set = { lr = [1e-4, 1e-3] }")
    refuse_unknown(varied, "--set")
    return Grid(
        [str(name) for name in _list(own.get("scenarios", list(SCENARIOS)))],
        [_seed(seed) for seed in _list(own.get("seeds", _SEEDS))],
        {name: _list(values) for name, values in varied.items()},
    )


def _list(value: Any) -> list[Any]:
    """Distinct values, in order; text has commas between."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return list(dict.fromkeys(value if isinstance(value, list) else [value]))


def _seed(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"--seeds {value!r}: must be whole numbers", "as in --seeds 1,2,3"
        ) from None


def _jobs(own: dict[str, Any]) -> int:
    jobs = own.get("jobs", 1)
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError(f"jobs {jobs!r}: must be a whole number from 1", "as in jobs = 2")
    return jobs


def _varied(given: list[str]) -> dict[str, list[Any]]:
    found = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} names no values", "write it as --set lr=1e-4,1e-3")
        found[name.strip().removeprefix("--").replace("-", "_")] = _list(values)
    return found


def _sync_once(runs: "list[PlannedRun]", out: Output) -> None:
    """Pairs in a bucket are fetched before the runs start, which then find them there."""
    settings = runs[0].settings.values
    if settings.s3_bucket:
        from clipft.cli.s3_data import bring_data

        bring_data(settings, out)


def _run(runs: "list[PlannedRun]", folder: Path, jobs: int, out: Output) -> "list[Outcome]":
    """Run what is left, with the report written at the end, however that comes."""
    from clipft.ablation.page import COSTS, FIGURES, ablation_rows, write_ablation_report
    from clipft.ablation.runner import Callbacks, run_all, write_state
    from clipft.cli.tables import rows_table
    from clipft.runs.folder import run_lock

    ended: dict[Path, Outcome] = {}
    numbers = {run.folder: number for number, run in enumerate(runs, 1)}

    def label(run: "PlannedRun") -> str:
        return f"{numbers[run.folder]}/{len(runs)} {run.variant} seed {run.seed}"

    def started(run: "PlannedRun") -> None:
        out.note(f"{label(run)} ... (log: {run.log})")

    def finished(outcome: "Outcome") -> None:
        ended[outcome.run.folder] = outcome
        write_state(folder, runs, ended)
        out.note(f"{label(outcome.run)}: {_ending(outcome)}")

    kept = sum(run.finished for run in runs)
    if kept:
        out.note(f"Finished already, and kept: {kept} of {counted(len(runs), 'run')}.")
    with run_lock(folder) as lock:
        write_state(folder, runs, ended)
        signal = run_all(runs, jobs, lock, Callbacks(started, finished))
        write_state(folder, runs, ended)
        content = write_ablation_report(folder, folder / "report.html")
    if signal:
        raise Interrupted(
            f"stopped by {signal}; the runs under way have saved their state in {folder}",
            "run the same command again to go on",
        )
    tables = [
        rows_table(title, columns, ablation_rows(content, columns))
        for title, columns in (("Ablation, figures in %", FIGURES), ("What it cost", COSTS))
    ]
    out.result(content, *tables, content["verdict"])
    end(out, {"runs": folder, "report": folder / "report.html"}, _best(content, folder))
    return list(ended.values())
