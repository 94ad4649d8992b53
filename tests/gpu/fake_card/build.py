"""Builds libraries that stand for the CUDA runtime and driver, and starts programs with them."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIRED = "REQUIRE_FAKE_CARD"
"""Set to 1 where the fake card must not be missing, as in CI: tests then fail instead of skip."""

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
# ``driver_types.h`` includes this one, which only the toolkit brings
_HOST_DEFINES = """
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __builtin_align__(a) __attribute__((aligned(a)))
#define __align__(a) __attribute__((aligned(a)))
#define CUDARTAPI
#define CUDART_CB
#define __forceinline__ inline
#define __noinline__
"""


class CannotBuild(Exception):
    """The reason why this machine cannot have the fake card."""


def environment() -> dict[str, str]:
    """The environment in which a program finds the fake card; the libraries are built once.

    Raises:
        CannotBuild: this is no Linux, PyTorch has no CUDA, or there is no C compiler.
    """
    import torch

    if sys.platform != "linux":
        raise CannotBuild("the fake CUDA card needs Linux")
    if not torch.version.cuda:
        raise CannotBuild(f"PyTorch {torch.__version__} was built without CUDA")
    sources = [_HERE / "runtime.c", _HERE / "driver.c"]
    stamp = hashlib.blake2b(b"".join(s.read_bytes() for s in sources), digest_size=6).hexdigest()
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"clipft-fake-card-{user}-{torch.__version__}-{stamp}"
    if not folder.exists():
        _build(folder)
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "runtime.so"),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def _build(folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise CannotBuild("there is no C compiler (cc)")
    headers = _cuda_headers()
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        building = Path(made) / "built"
        (building / "include" / "crt").mkdir(parents=True)
        (building / "include" / "crt" / "host_defines.h").write_text(_HOST_DEFINES)
        includes = [f"-I{headers}", f"-I{building / 'include'}"]
        for source, library, *more in (
            ("runtime.c", "runtime.so", *includes),
            ("driver.c", "libcuda.so.1", "-Wl,-soname,libcuda.so.1"),
        ):
            command = [compiler, "-shared", "-fPIC", "-w", *more]
            command += ["-o", str(building / library), str(_HERE / source)]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise CannotBuild(f"{source} does not compile: {built.stderr.strip()[:300]}")
        if not folder.exists():  # another process may have been faster
            building.rename(folder)


def _cuda_headers() -> Path:
    """The folder of ``driver_types.h`` of the CUDA that PyTorch was built with."""
    nvidia = importlib.util.find_spec("nvidia")
    places = list(nvidia.submodule_search_locations or []) if nvidia else []
    found = [h for place in places for h in Path(place).glob("*/include/driver_types.h")]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include/driver_types.h"
    for header in (*sorted(found), toolkit):
        if header.exists():
            return header.parent
    raise CannotBuild("the headers of CUDA (driver_types.h) are not installed")


def run(module: str, *args: str, timeout: float = 600) -> str:
    """Run a module of this repository on the fake card; return its standard output.

    Raises:
        CannotBuild: this machine cannot have the fake card.
        RuntimeError: the program failed.
    """
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(
        command, env=environment(), cwd=_ROOT, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-4000:]}")
    return done.stdout
