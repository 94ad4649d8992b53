"""The result of a search: ranked trials, importances, the verdict, and the settings to use."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipft.config.settings import SECTIONS
from clipft.config.settings_file import toml_value
from clipft.core.common import counted
from clipft.core.files import write_json, write_text
from clipft.tune.confirm import (
    DEFAULTS,
    SPLIT_TITLES,
    WINNER,
    OpenPairs,
    better,
    compared,
    confirming_runs,
    measured,
)
from clipft.tune.search import Search, best_of
from clipft.tune.soup import MakeSoup, souped
from clipft.tune.study import Trial

RESULT, BEST, MEASURED = "tune.json", "best.toml", "measured.json"
_OF_A_RUN = frozenset({"output_dir", "resume_from_checkpoint", "enable_s3_checkpoints"})
"""Settings for where a run is stored, which do not change its results."""

Json = Mapping[str, Any]


def finish(search: Search, measure: OpenPairs, make_soup: MakeSoup) -> dict[str, Any]:
    """Compare the winner with the defaults, average the best runs, and write ``tune.json`` and
    ``best.toml``.

    Returns:
        The content of tune.json.
    """
    folder, trials = search.study.folder, search.study.trials()
    runs = [run for run in confirming_runs(search) if run.recall() is not None]
    comparison = compared(runs, search.seeds[0])
    with search.study.turn():  # several processes may end at the same time
        figures = measured(search, runs, measure, folder / MEASURED)
        soup = souped(search, runs, better(comparison), make_soup)
    chosen = trials[0] if better(comparison) == DEFAULTS else best_of(trials)
    mattered = search.study.importances()
    content = {
        "kind": "tune",
        "format_version": 1,
        "folder": str(folder),
        "verdict": verdict(chosen, best_of(trials), comparison, figures) + _soup_words(soup),
        "budget": str(search.budget),
        "seconds": search.study.elapsed(),
        "searched": list(search.space.names),
        "trials": [_trial(trial, search) for trial in trials],
        "mattered": dict(sorted(mattered.items(), key=lambda item: -item[1])),
        "chosen": chosen.number,
        "changes": chosen.changes,
        "confirmation": comparison,
        "measured": figures,
        "soup": soup,
    }
    write_text(folder / BEST, best_toml(search, chosen))
    write_json(folder / RESULT, content, indent=1, ascii_only=False)
    return content


def _trial(trial: Trial, search: Search) -> dict[str, Any]:
    settings = search.space.settings(trial.changes).values
    home = search.study.home(trial.number).relative_to(search.study.folder)
    known = ("epochs", "epochs_run", "steps", "seconds", "why", "error", "hint")
    return {
        "number": trial.number,
        "state": trial.state,
        "recall": trial.recall,
        "changes": trial.changes,
        "folder": str(home / settings.scenario),
        **{name: trial.about.get(name) for name in known},
    }


def ranked(trials: Sequence[Json]) -> list[Json]:
    """Sort the trials of tune.json: finished trials by recall, then pruned ones by recall, then
    running and failed ones."""
    order = {"finished": 0, "pruned": 1, "running": 2, "failed": 3}
    return sorted(trials, key=lambda t: (order[t["state"]], -(t["recall"] or 0.0), t["number"]))


def verdict(chosen: Trial, best: Trial, comparison: Json, figures: Json) -> str:
    """Say which settings to use, and their result on pairs that were not used to choose them."""
    pairs = f"the {SPLIT_TITLES[figures['split']]} pairs"
    before, after, change = (figures[name] for name in (DEFAULTS, WINNER, "difference"))
    if not best.number:
        words = (
            "No trial is better than the defaults, so use these. Their mean recall on "
            f"{pairs} is {100 * before:.1f}%."
        )
    elif not chosen.number:
        points = _points(comparison["difference"]["mean"])
        words = (
            f"Use the defaults: with {counted(len(comparison['seeds']), 'other seed')}, trial "
            f"{best.number} is not better on the validation pairs ({points})."
        )
    else:
        subject = _subject(chosen.number, pairs, change)
        moved = f"from {100 * before:.1f}% to {100 * after:.1f}% ({_with_interval(change)})"
        words = f"{subject} {moved}, over {counted(figures['seeds'], 'seed')}."
    if figures["split"] == "val" and chosen.number:
        words += " It was chosen on these pairs, so it may look better than it is."
    return words


def _soup_words(soup: Json | None) -> str:
    if not soup:
        return ""
    own, best = (100 * soup[name]["recall"] for name in ("soup", "best_member"))
    return (
        f" A soup, the mean of the weights of {counted(len(soup['kept']), 'run')}, is at "
        f"{own:.1f}% on the {SPLIT_TITLES[soup['split']]} pairs, and the best of these runs at "
        f"{best:.1f}% ({_with_interval(soup['to_best_member'])})."
    )


def _subject(number: int, pairs: str, change: Json) -> str:
    """Return the beginning of the verdict on a trial, up to its figures."""
    if change.get("clear") is False:
        return f"No clear difference: with trial {number}, mean recall on {pairs} goes"
    if change["value"] > 0:
        return f"Trial {number} is better than the defaults: mean recall on {pairs} rises"
    return f"Trial {number} won on the validation pairs, but mean recall on {pairs} falls"


def _with_interval(change: Json) -> str:
    if change.get("low") is None:
        return _points(change["value"])
    low, high = 100 * change["low"], 100 * change["high"]
    return f"{_points(change['value'])}, 95% interval {low:+.1f} to {high:+.1f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def best_toml(search: Search, chosen: Trial) -> str:
    """Return the chosen settings as TOML for ``train --config``: those that the user has set, and
    those that the search has changed."""
    values = search.space.settings(chosen.changes).values.model_dump(mode="json")
    own = {name for name in search.space.given if name not in _OF_A_RUN}
    lines = [
        f"# Found by clipft tune: trial {chosen.number}.",
        "# Everything that is not in this file keeps its default.",
    ]
    for section in SECTIONS:
        for name in section.model_fields:
            origin = "searched" if name in chosen.changes else "given" if name in own else ""
            if origin and values[name] is not None:
                lines.append(f"{name} = {toml_value(values[name])}  # {origin}")
    return "\n".join(lines) + "\n"
