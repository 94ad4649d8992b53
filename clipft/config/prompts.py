"""Prompts of labels: sets of templates by name, from a file, or given directly."""

from pathlib import Path

from clipft.core.common import expand_home
from clipft.core.errors import UsageError, did_you_mean, sentences
from clipft.core.files import did_you_mean_path
from clipft.core.text import NotText, read_text

TEMPLATES: dict[str, tuple[str, ...]] = {
    "general": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a good photo of a {}.",
        "a close-up photo of a {}.",
        "a bright photo of a {}.",
        "a picture of a {}.",
        "itap of a {}.",
    ),
    "furniture": (
        "a photo of a {}.",
        "a product photo of a {}.",
        "a {} on a white background.",
        "a {} in a room.",
        "a {}, furniture.",
        "a catalogue picture of a {}.",
        "{}",
    ),
}
SEPARATOR = "||"
"""Stands between several templates that are given directly."""


def prompt_templates(option: str, given: str) -> tuple[str, ...]:
    """Read the value of an option that takes prompts with ``{}`` in place of the label.

    Args:
        option: the name of the option, for messages.
        given: a name in ``TEMPLATES``, templates separated by ``||``, or a file with one per line.

    Raises:
        UsageError: there is no such file, or a template has no {}.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    templates = lines_of(option, given)
    if templates is None and "{}" not in given:
        meant = did_you_mean(given, TEMPLATES) or did_you_mean_path(Path(given))
        names = " or ".join(TEMPLATES)
        raise UsageError(
            f"{option} {given}: there is no such set of templates and no such file",
            sentences(meant, f"name {names}, or a file with one template per line"),
        )
    if templates is None:
        templates = [part.strip() for part in given.split(SEPARATOR)]
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UsageError(
            f"{option} {given}: "
            + (f"there is no {{}} in {wrong[0]!r}" if wrong else "the file has no templates"),
            "write {} where the label belongs, as in: a photo of a {}",
        )
    return tuple(templates)


def lines_of(option: str, given: str) -> list[str] | None:
    """Read a file with one entry per line; None if there is no such file."""
    path = expand_home(given)
    try:
        if not path.is_file():
            return None
        text = read_text(path)
    except (OSError, NotText) as error:
        raise UsageError(f"{option}: cannot read {given}: {error}", "save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
