"""Options for runs that take seconds, whichever test starts them."""

TINY = ["--model", "tiny", "--num-workers", "0", "--mini-train", "--precision", "fp32"]
"""A few steps of the packaged model, on the pairs that ``--data-dir`` names."""
