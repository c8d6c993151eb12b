"""A pod to try things on."""

from __future__ import annotations

import pytest

from tests.placement.pods import Pod


@pytest.fixture
def pod() -> Pod:
    """An empty pod of 10 bytes that knows the models a to e."""
    pod = Pod()
    pod.register(*"abcde")
    return pod
