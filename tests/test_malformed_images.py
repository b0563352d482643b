"""A few malformed images; ``python tests/malformed_images.py 500`` tries many."""

from __future__ import annotations

import pytest
from malformed_images import check

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning:PIL")]


def test_malformed_images(tmp_path):
    results = check(tmp_path / "run", range(24))
    assert results["read"] >= 4
    assert results["refused"] >= 8


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_a_large_image_with_transparency(tmp_path):
    """One that is allowed: 81 million pixels, or 121."""
    assert sum(check(tmp_path / "run", range(24, 25), match=False).values()) == 2
