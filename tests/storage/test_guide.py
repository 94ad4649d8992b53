"""Run the commands of the S3 guide against a server."""

import pytest

from clipft.data.demo.catalogue import write_catalogue
from tests.benchmarks.write_docs import DOCS
from tests.documents import SMALL, run_page


@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_guide_work(client, server, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLIPFT_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    client.create_bucket(Bucket="my-bucket")
    write_catalogue(tmp_path / "rendered", 100, 3, lambda done, total: None)
    (tmp_path / "rendered" / "train").rename(tmp_path / "photos")
    assert run_page(DOCS / "guides" / "s3.md")
