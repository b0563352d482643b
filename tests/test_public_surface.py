"""What the release before offered is still there: names, operators, state dicts, commands and their options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from public_surface import surface

BEFORE = json.loads(Path(__file__).with_name("public_surface.json").read_text())


@pytest.fixture(scope="module")
def now():
    # As JSON has it: lists for tuples.
    return json.loads(json.dumps(surface()))


def lost(before, now, where=""):
    """Each place where ``now`` lacks or changes what ``before`` has; more than that is no loss."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name, part in before.items():
            if name not in now:
                yield f"{where} {name}: gone"
            else:
                yield from lost(part, now[name], f"{where} {name}")
    elif before != now:
        yield f"{where}: {before} became {now}"


@pytest.mark.parametrize("part", sorted(BEFORE))
def test_nothing_that_users_rely_on_is_lost(part, now):
    before, after = BEFORE[part], now[part]
    if isinstance(before, list) and part != "state_dicts":
        # What stands in a list may be joined by more.
        before, after = dict.fromkeys(before), dict.fromkeys(after)
    assert list(lost(before, after, part)) == []


def test_a_loss_is_seen():
    before = {"a": {"x": ["self", "k=1"]}, "b": 1}
    assert list(lost(before, before)) == []
    assert list(lost(before, {"a": {"x": ["self", "k=2"]}})) == [
        " a x: ['self', 'k=1'] became ['self', 'k=2']",
        " b: gone",
    ]
