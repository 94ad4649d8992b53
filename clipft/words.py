"""Words that more than one message needs."""


def counted(count: int, thing: str) -> str:
    """``1 pair``, ``2,000 pairs``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
