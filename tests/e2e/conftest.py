"""Which of these tests are long: those with a browser or an edge in front of a live service."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"page", "browser", "caddy", "live"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)
