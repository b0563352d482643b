"""The table of where published commands differ names options that exist, and defaults that are."""

import re
import shlex
from pathlib import Path

import pytest

from lift_fast.cli import build_parser

TEXT = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = {
    "DAVIS": ["eval", "davis", "--root", "x"],
    "Discovery": ["eval", "discovery", "--root", "x", "--dataset", "voc07"],
    "SPair": ["eval", "spair", "--root", "x"],
    "LiFT": ["eval", "davis", "--root", "x"],
    "Training": ["train", "x", "--out", "y"],
}


def rows():
    table = TEXT.split("| what | published | ours | why | for the published one |\n")[1].split("\n\n")[0]
    for line in table.splitlines()[1:]:
        what, *_, how = [cell.strip() for cell in line.strip("|").split("|")]
        yield what, how


def test_there_is_a_row_for_each_difference():
    found = [what for what, _ in rows()]
    assert len(found) == len(set(found)) > 20
    for word in ("size of images", "pairs", "epochs", "partial batch", "EXIF", "16-bit", "plateaus", "56 pixels"):
        assert any(word in what for what in found), word


@pytest.mark.parametrize(("what", "how"), [(what, how) for what, how in rows() if "`--" in how])
def test_options_of_the_table_exist(what, how):
    command = next((arguments for name, arguments in COMMANDS.items() if what.startswith(name)), None)
    assert command is not None, what
    parser = build_parser()
    for text in re.findall(r"`(?:lift-fast train )?(--[^`]*)`", how):
        words = shlex.split(text)
        if len(words) == 1 and words[0] not in ("--binary-masks",):
            words.append("2")
        plain, chosen = (vars(parser.parse_args([*command, *more])) for more in ([], words))
        changed = [name for name in plain if plain[name] != chosen[name]]
        if "(default)" in how or words == ["--epochs", "5"]:
            assert not changed, f"{text} is no default"
        else:
            assert len(changed) == len([word for word in words if word.startswith("--")]), text
