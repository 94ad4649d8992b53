"""``clipft ablate`` and ``clipft tune``."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import field_validator

from clipft.cli.answers import FigureOptions, ablation_answer, say_more, tune_answer
from clipft.cli.console import Output, end, print_error
from clipft.cli.options import command
from clipft.config.fields import Section, setting
from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import Settings
from clipft.config.settings_file import read_toml
from clipft.config.sources import LoadedSettings, known_settings, refuse_unknown, validated
from clipft.core.common import counted
from clipft.core.errors import Interrupted, RunsFailed, UsageError, did_you_mean
from clipft.tune.budget import Budget
from clipft.tune.space import SEARCHED, check_searchable

if TYPE_CHECKING:
    from clipft.ablation.grid import PlannedRun
    from clipft.ablation.runner import Outcome

_SET_BY_ABLATION = {"scenario", "seed", "resume_from_checkpoint", "enable_s3_checkpoints"}
_TABLE = "ablate"


def _listed(value: Any) -> list[Any]:
    """Distinct values in order; text is split at commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return list(dict.fromkeys(value if isinstance(value, list) else [value]))


class AblateOptions(FigureOptions):
    """The options of an ablation, from flags or from the table ``[ablate]`` of a TOML file."""

    title = "Ablation"
    scenarios: list[str] | None = setting(
        None, "Scenarios to run, separated by commas. Default: all.", metavar="A,B"
    )
    seeds: list[int] = setting([1, 2, 3], "Seeds to run, separated by commas.", metavar="N,N")
    set: dict[str, list[Any]] = setting(
        {},
        "A setting to vary and its values, such as lr=1e-4,1e-3. May be repeated.",
        metavar="NAME=A,B",
    )
    jobs: int = setting(1, "Number of runs at the same time. Several GPUs are used in turn.", ge=1)

    @field_validator("scenarios", "seeds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _listed(value)

    @field_validator("set", mode="before")
    @classmethod
    def _parse_set(cls, value: Any) -> Any:
        """Accept a table of a TOML file, or flags like ``lr=1e-4,1e-3``."""
        if isinstance(value, list):
            pairs = [text.partition("=") for text in value]
            for name, equals, _ in pairs:
                if not equals:
                    raise UsageError(
                        f"--set {name!r} has no values", "write it as --set lr=1e-4,1e-3"
                    )
            value = {
                name.strip().removeprefix("--").replace("-", "_"): values
                for name, _, values in pairs
            }
        if not isinstance(value, dict):
            raise UsageError(
                "set must be a table of settings", "write it as set = { lr = [1e-4, 1e-3] }"
            )
        return {n: _listed(values) for n, values in known_settings(value, "--set").items()}


@command(
    *(name for name in Settings.model_fields if name not in _SET_BY_ABLATION),
    options=AblateOptions,
)
def ablate(
    loaded: LoadedSettings,
    options: AblateOptions,
    out: Output,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="TOML file with settings, and a table [ablate] with scenarios, seeds, jobs and "
            "set.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare scenarios, settings and seeds, and name the best.

    Runs every combination of scenario, settings and seed, each as `clipft train` in its own
    process and its own folder in --output-dir. Run the same command again to continue after a
    stop or to retry failed runs. If you add scenarios, seeds or values, only new combinations
    run. If there are test pairs, the runs are measured on them too; the validation pairs alone
    decide which is best. The exit code is 8 if some runs failed.

    Examples:

        clipft ablate --data-dir ./catalogue --output-dir ./ablation
        clipft ablate --scenarios dual_lora --set lr=1e-4,1e-3 --set lora_r=8,16
        clipft ablate ablation.toml --jobs 2
    """
    from clipft.ablation.grid import Grid, check_same_ablation, plan_runs
    from clipft.cli.preflight import check_ablation, import_libraries

    given = read_toml(file) if file else {}
    table = given.pop(_TABLE, {})
    if not isinstance(table, dict):
        raise UsageError(
            f"{_TABLE} in {file} is not a table", 'for example: [ablate] / scenarios = ["full"]'
        )
    refuse_unknown(table, AblateOptions, f"[{_TABLE}] of {file}")
    typed = {name: getattr(options, name) for name in options.model_fields_set}
    origins = dict.fromkeys(AblateOptions.model_fields, f"[{_TABLE}] of {file}")
    options = validated(AblateOptions, table | typed, origins | dict.fromkeys(typed, "flag"))

    for name, value in given.items():
        if isinstance(value, dict):
            meant = did_you_mean(name, [_TABLE], lambda table: f"[{table}]")
            hint = (
                meant
                or f"write settings at the top of the file; [{_TABLE}] is the only table in it"
            )
            raise UsageError(f"unknown table [{name}] in {file}", hint)
    # Only what the user has set, so that each scenario can bring defaults of its own
    base = known_settings(given, file or "") | loaded.given()
    folder = Path(base.get("output_dir", loaded.values.output_dir))
    scenarios = list(SCENARIOS) if options.scenarios is None else options.scenarios
    runs = plan_runs(Grid(scenarios, options.seeds, options.set), base, folder)
    check_ablation(folder, [run.settings.values for run in runs if not run.finished])
    settings = runs[0].settings.values
    if settings.s3_bucket:  # once, so that every run finds the pairs
        from clipft.cli.s3_data import bring_data

        bring_data(settings, out)
    import_libraries()
    from clipft.models.pretrained import load_pretrained
    from clipft.training.defaults import follow_catalogue

    notes = dict[str, None]()
    runs = [replace(run, settings=follow_catalogue(run.settings, notes.setdefault)) for run in runs]
    for note in notes:
        out.note(note)
    check_same_ablation(runs)
    for model in sorted({run.settings.values.model for run in runs if not run.finished}):
        load_pretrained(model)  # once, so that a broken model is refused before the first run
    outcomes = _run(runs, folder, options, out)
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if failed:
        first = failed[0]
        error = RunsFailed(
            f"{len(failed)} of {counted(len(runs), 'run')} failed, first {first.run.variant} seed "
            f"{first.run.seed} with exit code {first.exit_code}: {first.error}",
            first.hint,
        )
        print_error(error, as_json=False)  # stdout has the JSON object already
        raise typer.Exit(error.exit_code)


def _run(
    runs: "list[PlannedRun]", folder: Path, options: AblateOptions, out: Output
) -> "list[Outcome]":
    """Run what is not finished yet, and write the report even if not all runs end well."""
    from clipft.ablation.page import write_ablation_report
    from clipft.ablation.runner import measure_on_test, run_all, write_state
    from clipft.metrics.figures import mean_recall
    from clipft.runs.folder import read_run, run_lock

    ended: dict[Path, Outcome] = {}
    numbers = {run.folder: number for number, run in enumerate(runs, 1)}

    def label(run: "PlannedRun") -> str:
        return f"{numbers[run.folder]}/{len(runs)} {run.variant} seed {run.seed}"

    def started(run: "PlannedRun") -> None:
        out.note(f"{label(run)} ... (log: {run.log})")

    def finished(outcome: "Outcome") -> None:
        ended[outcome.run.folder] = outcome
        write_state(folder, runs, ended)
        if outcome.exit_code:
            ending = f"failed with exit code {outcome.exit_code}: {outcome.error}"
        else:
            result = read_run(outcome.run.folder).result or {}
            ending = f"mean recall {mean_recall(result['after'] or result['before']):.1%}"
        out.note(f"{label(outcome.run)}: {ending}")

    done = sum(run.finished for run in runs)
    if done:
        out.note(f"Already finished: {done} of {counted(len(runs), 'run')}.")
    with run_lock(folder) as lock:
        write_state(folder, runs, ended)
        signal = run_all(runs, options.jobs, lock, started, finished)
        write_state(folder, runs, ended)
        if not signal:
            measure_on_test(runs, lambda run: out.note(f"{label(run)}: measuring on test pairs"))
        content = write_ablation_report(folder, folder / "report.html")
    if signal:
        raise Interrupted(
            f"stopped by {signal}; the unfinished runs have saved their state in {folder}",
            "run the same command again to continue",
        )
    _show(content, folder, options, out)
    return list(ended.values())


def _show(content: dict[str, Any], folder: Path, options: FigureOptions, out: Output) -> None:
    out.result(content, *ablation_answer(content, options))
    say_more(out, options, "the curves and each run")
    end(out, {"runs": folder, "report": folder / "report.html"}, _best_run(content, folder))


def _best_run(content: dict[str, Any], folder: Path) -> tuple[object, ...]:
    """Return the command that evaluates the best run of the variant with the best mean."""
    from clipft.metrics.figures import mean_recall

    means = {v["name"]: v["mean_recall"] for v in content["variants"] if v["mean_recall"]}
    found = [run for run in content["runs"] if run["after"] and run["variant"] in means]
    if not found:
        return ()
    best = max(found, key=lambda r: (means[r["variant"]]["mean"], mean_recall(r["after"])))
    return ("evaluate", folder / best["folder"])


_NOT_TUNED = frozenset(
    ("resume_from_checkpoint", "enable_s3_checkpoints", "processes", "shard_weights")
)


class TuneOptions(Section):
    title = "Search"
    budget: str = setting(
        "1h",
        "How long to search: a total time (30m, 2h) or a number of trials (20).",
        metavar="TIME|N",
    )
    search: list[str] = setting(
        [],
        "Settings to search, separated by commas. Default: those of "
        f"{', '.join(SEARCHED)} that you have not set.",
        metavar="A,B",
    )
    confirm: int = setting(
        3,
        "Number of seeds with which the best trial is compared with the defaults.",
        unit="seeds",
        ge=1,
    )
    workers: int = setting(
        1,
        "Number of trials at the same time. Several GPUs are used in turn.",
        unit="processes",
        ge=1,
    )
    all: bool = setting(False, "Show every trial, not only the best ones.")

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, value: str) -> str:
        Budget.parse(value)
        return value

    @field_validator("search", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        words = value.split(",") if isinstance(value, str) else value
        return [word.strip().removeprefix("--").replace("-", "_") for word in words if word.strip()]


@command(
    *(name for name in Settings.model_fields if name not in _NOT_TUNED),
    options=TuneOptions,
    profile={"output_dir": "./tune"},
)
def tune(loaded: LoadedSettings, options: TuneOptions, out: Output) -> None:
    """Search for better settings within a budget.

    The first trial is what `clipft train` would do. The next ones each change one setting of the
    best trial that you have not set, and Optuna chooses later ones. Trials that fall behind are
    stopped early. At the end, the best one and the defaults are trained with several seeds, the
    validation pairs decide between them, and the test pairs show the difference. A soup, the mean
    of the best runs' weights, is the last candidate. Each trial is a normal run, in --output-dir.
    Run the same command again to continue after a stop, or with a larger --budget. Needs Optuna:
    pip install 'clipft[tune]'.

    Examples:

        clipft tune --data-dir ./catalogue --budget 2h
        clipft tune --data-dir ./catalogue --budget 20 --scenario dual_lora
        clipft tune --data-dir ./catalogue --search lr,epochs --workers 2
        clipft train --config ./tune/best.toml
    """
    from clipft.cli.preflight import check_ablation, import_libraries

    _check_optuna()
    settings = loaded.values
    check_searchable(options.search, loaded.given())
    if not settings.declared_scenario.trains:
        raise UsageError(
            f"scenario {settings.scenario} trains nothing, so there is nothing to search",
            "leave --scenario out, or choose another one",
        )
    if settings.label_prompts:
        raise UsageError(
            "tune searches for the best mean recall, but --label-prompts trains for accuracy",
            "leave --label-prompts out, or compare settings with `clipft ablate`",
        )
    check_ablation(settings.output_dir, [settings])
    if settings.s3_bucket:
        from clipft.cli.s3_data import bring_data

        bring_data(settings, out)
    import_libraries()
    from clipft.tune.session import open_session, run_session

    budget = Budget.parse(options.budget)
    session, notes = open_session(loaded, options.search, budget, options.confirm, options.workers)
    for note in notes:
        out.note(note)
    content = run_session(session, out.note)
    out.result(content, *tune_answer(content, options.all))
    if not options.all:
        out.note("More: --all shows every trial, and tune.json has their settings in full.")
    folder = settings.output_dir
    best = folder / "best.toml"
    soup = {"soup": Path(content["soup"]["folder"])} if content["soup"] else {}
    end(out, {"settings": best, "trials": folder / "trials", **soup}, ("train", "--config", best))


def _check_optuna() -> None:
    if find_spec("optuna") is None:
        raise UsageError(
            "clipft tune needs optuna",
            "install it: pip install 'clipft[tune]', or pipx inject clipft optuna",
        )
