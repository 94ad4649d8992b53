"""A server for the examples of the help that name a bucket."""

from tests.storage.conftest import client, own_credentials, parsed_once, server

__all__ = ["client", "own_credentials", "parsed_once", "server"]
