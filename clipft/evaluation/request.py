"""The request for an evaluation, checked before it starts and without importing torch."""

from dataclasses import dataclass
from pathlib import Path

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.core.files import check_writable

_MAX_POINTS = 101


@dataclass(frozen=True)
class Request:
    """What to measure besides the comparison of the two models.

    ``keep`` is a general data set on which the loss by fine-tuning is measured. Weights between the
    two models are evaluated at each of ``alphas``, and those at ``save_at`` are written to
    ``save_to``. ``split`` chooses the pairs as in ``evaluation_pairs``. ``frontier`` holds other
    runs to compare with these weights.
    """

    keep: Path | None
    alphas: list[float]
    save_at: float | None
    save_to: Path | None
    split: str = "auto"
    frontier: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls,
        keep: Path | None,
        interpolate: str | None,
        at: float | None,
        to: Path | None,
        split: str = "auto",
        frontier: tuple[Path, ...] = (),
    ) -> "Request":
        """Check and return a request. ``interpolate`` has the format of ``parse_alphas``.

        Raises:
            UsageError: ``interpolate`` or ``at`` is not between 0 and 1, or the frontier lacks a
                general set or points to compare with.
            StorageError: ``to`` cannot be written.
        """
        if frontier and not (keep and interpolate):
            raise UsageError(
                "--frontier needs a general set and points between the two models",
                "add --keep DATA and --interpolate 0:1:0.1",
            )
        if at is not None and not 0 <= at <= 1:
            raise UsageError(
                f"--save-interpolated {at:g} is not between 0 (pretrained) and 1 (fine-tuned)",
                "choose a value from 0 to 1, such as the best point of --interpolate 0:1:0.1",
            )
        if to:
            check_writable(to)
        alphas = parse_alphas(interpolate) if interpolate else []
        return cls(keep, alphas, at, to, split, frontier)


def general_settings(settings: Settings, folder: Path) -> Settings:
    """Return the settings for the general data set in ``folder``.

    It has its own captions and labels, and no groups of products.
    """
    texts = ("caption", "caption_lines", "fields", "label_prompts")
    own = (*texts, "label_field", "group_field", "grade_field")
    changed = {name: Settings.model_fields[name].default for name in own}
    return settings.model_copy(update={**changed, "data_dir": folder})


def parse_alphas(text: str) -> list[float]:
    """Read ``START:STOP:STEP`` (both ends included), or values in 0..1 separated by commas.

    Raises:
        UsageError: it is neither, or has too many points.
    """
    wrong = UsageError(
        f"--interpolate {text} does not give points between 0 (pretrained) and 1 (fine-tuned)",
        f"write 0:1:0.1 or 0,0.5,1, with at most {_MAX_POINTS} points",
    )
    try:
        alphas = [float(part) for part in text.replace(":", ",").split(",")]
        if ":" in text:
            start, stop, step = alphas
            if step <= 0 or (stop - start) / step > _MAX_POINTS:
                raise wrong
            whole_steps = int((stop - start) / step + 1e-9)  # 1 / 0.1 may fall just below 10
            alphas = [round(start + step * number, 10) for number in range(whole_steps + 1)]
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if not all(0 <= alpha <= 1 for alpha in alphas) or not 0 < len(alphas) <= _MAX_POINTS:
        raise wrong
    return alphas
