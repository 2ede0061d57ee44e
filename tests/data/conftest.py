"""A web server that follows a script, for downloads and stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from web_server import Server, following_a_script


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, which serves while a test runs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with following_a_script() as plan:
        yield plan
