"""Checks for the libraries that ``clipft embed`` needs, without importing them."""

from importlib.util import find_spec

from clipft.core.errors import UsageError


def check_installed(faiss: bool) -> None:
    """Check that pyarrow is installed, and with ``faiss`` also faiss-cpu or faiss-gpu.

    Raises:
        UsageError: One of them is missing.
    """
    for needed, module, package in ((True, "pyarrow", "pyarrow"), (faiss, "faiss", "faiss-cpu")):
        if needed and find_spec(module) is None:
            what = "--index faiss" if module == "faiss" else "clipft embed"
            raise UsageError(
                f"{what} needs the package {package}", f"run `pipx inject clipft {package}`"
            )
