"""A small, seeded share of what ``tests/malformed.py`` does at length."""

from __future__ import annotations

import malformed
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 30


@pytest.fixture(scope="module", params=["lift", "backbone", "last"])
def kind(request, tmp_path_factory):
    return malformed.Kind(request.param, tmp_path_factory.mktemp(request.param))


def test_malformed_files_are_refused_in_a_line_or_load_right(kind):
    before = malformed.peak_megabytes()
    outcomes = malformed.run(kind, 0, COUNT)
    assert sum(outcomes.values()) == COUNT
    assert malformed.peak_megabytes() - before < malformed.MEGABYTES
    # Otherwise the files are not malformed.
    assert sum(number for name, number in outcomes.items() if name.endswith("refused")) > COUNT / 2


def test_other_weights_than_the_files_would_be_noticed(tmp_path):
    content = {"module.a": torch.ones(2), "b": torch.ones(2)}
    torch.save(content, tmp_path / "file.pth")
    malformed.same_values({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "file.pth")
    for wrong in ({"a": torch.zeros(2)}, {"c": torch.ones(2)}):
        with pytest.raises(malformed.Wrong):
            malformed.same_values(wrong, tmp_path / "file.pth")
