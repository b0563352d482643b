"""A few of the random calls of :mod:`fuzz`; ``python tests/fuzz.py --calls 20000`` makes many."""

from __future__ import annotations

import os

import fuzz
import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of NumPy, which the interpreter computes with.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
CALLS = {"nearest": 60, "dense_match": 60, "cosine_loss": 100, "propagate_labels": 60, "lift": 40, "junk": 200}


@pytest.mark.parametrize("operator", CALLS)
def test_random_calls(operator):
    # The same ones every time: others would fail on days without a change.
    for seed in range(CALLS[operator]):
        fuzz.one_call(seed, operator)


def test_the_check_sees_a_wrong_result(monkeypatch):
    """Each operator's answer, spoilt a little."""

    def spoilt(function, change):
        def call(*arguments, **options):
            return change(function(*arguments, **options))

        return call

    def shift_index(result):
        index = torch.where(result.index > 0, result.index - 1, result.index)
        return type(result)(result.similarity, index, result.valid)

    def shift_match(result):
        xy = torch.where(result.xy > 0, result.xy - 1, result.xy)
        return type(result)(result.similarity, xy, result.valid)

    def flip_valid(result):
        return type(result)(*result[:2], ~result.valid)

    def larger(result):
        return result * (1 + 1e-3) + 1e-3

    changes = {
        "nearest": [("nearest", shift_index), ("nearest", flip_valid)],
        "dense_match": [("dense_match", shift_match), ("dense_match", flip_valid)],
        "cosine_loss": [("cosine_loss", larger)],
        "propagate_labels": [("propagate_labels", larger)],
    }
    for operator, spoilings in changes.items():
        for name, change in spoilings:
            with monkeypatch.context() as patch:
                patch.setattr(fuzz, name, spoilt(getattr(fuzz, name), change))
                found = 0
                for seed in range(12):
                    try:
                        fuzz.one_call(seed, operator)
                    except fuzz.Wrong:
                        found += 1
                assert found >= 4, (operator, change.__name__, found)
