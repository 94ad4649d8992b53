"""All checks in the order in which one needs another: a library that does not load is named
before what would have been computed with it."""

from collections.abc import Callable

from clipft.config.settings import Settings
from clipft.core.errors import ClipftError, first_line
from clipft.doctor import libraries, machine, reach
from clipft.doctor.finding import Check, Examined, Finding
from clipft.models.pretrained import quiet_libraries

CHECKS = (
    Check("Python", machine.python),
    Check("packages", libraries.packages),
    Check("libraries fit", libraries.fit),
    Check("device", libraries.device),
    Check("precision", libraries.precision),
    Check("8-bit optimizer", libraries.eight_bit),
    Check("memory", machine.memory),
    Check("shared memory", machine.shared_memory),
    Check("open files", machine.descriptors),
    Check("output folder", machine.output_folder),
    Check("cache folder", machine.cache),
    Check("pairs", reach.pairs),
    Check("model", reach.model),
    Check("bucket", reach.bucket),
    Check("W&B", reach.tracking),
)


def examine(settings: Settings, report: Callable[[int, int], None]) -> list[Examined]:
    """Go through all checks; ``report`` is told (done, all). Nothing is changed or kept."""
    quiet_libraries()
    found = list[Examined]()
    for check in CHECKS:
        report(len(found), len(CHECKS))
        found.append(Examined(check.name, _answer(check, settings)))
    return found


def _answer(check: Check, settings: Settings) -> Finding:
    """An error is an answer: the checks after it are still wanted."""
    try:
        return check.look(settings)
    except ClipftError as error:
        return Finding("error", error.message, error.hint)
    except Exception as error:  # such as a library that does not load
        return Finding(
            "error",
            f"cannot be looked at: {type(error).__name__}: {first_line(error)}",
            "mend what is named above first",
        )
