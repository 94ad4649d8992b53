import os

import pytest

from tests.gpu.fake_card import build


@pytest.fixture(scope="session")
def fake_card():
    """Starts a module on the fake card; skips where that cannot be built, but not in CI."""
    try:
        build.environment()
    except build.CannotBuild as why:
        if os.environ.get(build.REQUIRED) == "1":
            pytest.fail(f"{build.REQUIRED} is set: {why}")
        pytest.skip(f"no fake CUDA card: {why}")
    return build.run
