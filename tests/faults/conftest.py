import pytest

from tests.faults.outside import Programs


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    started = Programs(tmp_path_factory.mktemp("programs"))
    yield started
    started.close()
