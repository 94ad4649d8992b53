"""Options for runs that take seconds."""

TINY = ["--model", "tiny", "--num-workers", "0", "--mini-train", "--precision", "fp32"]
"""A few steps of the packaged model. ``--data-dir`` must be added."""
