"""Results compared at any depth."""

from __future__ import annotations

import pytest


def assert_alike(found: object, expected: object) -> None:
    """Equal but for rounding, at any depth."""
    if isinstance(found, dict):
        assert isinstance(expected, dict) and found.keys() == expected.keys()
        for name in found:
            assert_alike(found[name], expected[name])
    elif isinstance(found, list):
        assert isinstance(expected, list)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif not isinstance(found, float):
        assert found == expected
    else:
        assert found == pytest.approx(expected, abs=1e-9)
