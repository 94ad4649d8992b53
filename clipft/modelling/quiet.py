"""Libraries' own notices about themselves are not for our users."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Before the first of them is imported; loads none itself."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
