"""A kernel that comes in a package of its own is asked for by its package's name where that is missing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from cadapter.errors import UsageError
from cadapter.models.attention import PACKAGES, check_installed


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_how_to_install_it(name: str) -> None:
    if find_spec(PACKAGES[name][0]) is not None:
        pytest.skip(f"{PACKAGES[name][0]} is installed")
    with pytest.raises(UsageError, match=rf'attn_implementation = "{name}": its package .* is not installed') as caught:
        check_installed(name)
    assert "Install it" in str(caught.value)
    assert 'attn_implementation = "auto"' in str(caught.value)


def test_what_comes_with_pytorch_needs_nothing() -> None:
    for name in ("auto", "sdpa", "eager"):
        check_installed(name)
