"""Runs all checks. The cause of a problem is checked before its consequences."""

from collections.abc import Callable

from clipft.config.settings import Settings
from clipft.core.errors import ClipftError, first_line
from clipft.doctor import Finding, libraries, machine, reach
from clipft.models.source import quiet_libraries

CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "Python": machine.python,
    "packages": libraries.packages,
    "libraries fit": libraries.fit,
    "device": libraries.device,
    "precision": libraries.precision,
    "8-bit optimizer": libraries.eight_bit,
    "memory": machine.memory,
    "shared memory": machine.shared_memory,
    "open files": machine.descriptors,
    "output folder": machine.output_folder,
    "cache folder": machine.cache,
    "pairs": reach.pairs,
    "model": reach.model,
    "bucket": reach.bucket,
    "W&B": reach.tracking,
}


def examine(settings: Settings, report: Callable[[int, int], None]) -> dict[str, Finding]:
    """Run all checks and return their findings, by name.

    ``report`` is called with (done, total) before each check. Checks leave nothing behind.
    """
    quiet_libraries()
    findings = dict[str, Finding]()
    for name in CHECKS:
        report(len(findings), len(CHECKS))
        findings[name] = run_check(name, settings)
    return findings


def run_check(name: str, settings: Settings) -> Finding:
    """Run one check. An exception becomes a finding, so that the other checks still run."""
    try:
        return CHECKS[name](settings)
    except ClipftError as error:
        return Finding("error", error.message, error.hint)
    except Exception as error:  # such as a library that does not load
        return Finding(
            "error",
            f"the check failed: {type(error).__name__}: {first_line(error)}",
            "fix the errors listed above first",
        )
