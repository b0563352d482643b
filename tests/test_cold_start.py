"""What is not imported before it is needed, and that everything is there when it is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import lift_fast
from lift_fast import _operators
from lift_fast.cli import build_parser, clock

HEAVY = ("torch", "numpy", "timm", "PIL", "triton", "torchvision", "huggingface_hub", "safetensors", "matplotlib")


def python(code, *arguments):
    """What code in a new interpreter prints as JSON on its last line."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def commands(parser=None, words=()):
    """The words of every command."""
    yield words
    for action in (parser or build_parser())._actions:
        for word, below in (action.choices if action.nargs == "A..." else {}).items():
            yield from commands(below, (*words, word))


def test_no_help_imports_what_only_a_run_needs():
    every = [[*words, "--help"] for words in commands()]
    assert ["match", "--help"] in every
    assert ["eval", "spair", "--help"] in every
    code = """
        import json, sys
        from lift_fast.cli import main
        every, heavy = map(json.loads, sys.argv[1:])
        found = {}
        for words in every:
            sys.argv = ["lift-fast", *words]
            try:
                status = main()
            except SystemExit as end:
                status = end.code
            assert status == 0, words
            found[" ".join(words)] = [name for name in heavy if name in sys.modules]
        print(json.dumps(found))
    """
    found = python(code, json.dumps([*every, ["--version"]]), json.dumps(HEAVY))
    assert len(found) == len(every) + 1
    assert {words: names for words, names in found.items() if names} == {}


def test_the_package_imports_nothing_heavy():
    code = """
        import json, sys
        import lift_fast, lift_fast.cli, lift_fast.training
        dir(lift_fast), lift_fast.__version__, lift_fast.demonstration, lift_fast.training.TrainingSettings
        print(json.dumps(sorted(sys.modules)))
    """
    assert set(HEAVY).isdisjoint(python(code))


def test_every_operator_is_listed():
    folder = Path(_operators.__file__).parent / "ops"
    defining = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if "library.define(" in path.read_text()
    }
    assert set(_operators._MODULES) == defining


@pytest.mark.parametrize("first", ["torch", "lift_fast"])
def test_operators_come_with_pytorch(first):
    """A program that only runs a saved graph calls them without a name of the package."""
    second = "torch" if first == "lift_fast" else "lift_fast"
    code = f"""
        import importlib.util, json
        # Asking whether it is there imports nothing.
        assert importlib.util.find_spec("torch") is not None
        import {first}
        import {second}
        rows = torch.eye(3)[None]
        print(json.dumps([
            torch.ops.lift_fast.nearest(rows, rows.flip(1), 1, False, None, None, True, False)[1].flatten().tolist(),
            [hasattr(torch.ops.lift_fast, name) for name in ("cosine_loss", "dense_match", "lift_forward",
             "propagate_labels")],
            "lift_fast.lift" in __import__("sys").modules,
        ]))
    """
    # The modules above the operators wait for their own first use.
    assert python(code) == [[2, 1, 0], [True] * 4, False]


def test_an_error_of_an_operator_is_not_pytorchs():
    code = """
        import json, sys
        import lift_fast
        sys.modules["lift_fast.ops.nearest"] = None
        import torch
        try:
            lift_fast.nearest
        except ImportError as error:
            print(json.dumps([torch.ones(2).sum().item(), "lift_fast.ops.nearest" in str(error)]))
    """
    assert python(code) == [2.0, True]


def test_every_name_comes_at_its_first_use():
    code = """
        import json, pickle, sys
        import lift_fast
        assert set(lift_fast.__all__) <= set(dir(lift_fast))
        before = "torch" in sys.modules
        from lift_fast import *
        names = {name: type(globals()[name]).__name__ for name in lift_fast.__all__}
        restored = pickle.loads(pickle.dumps([LiFT, nearest, Window(2, (3, 3))]))
        print(json.dumps([before, names, restored == [LiFT, nearest, Window(2, (3, 3))]]))
    """
    before, names, restored = python(code)
    assert not before
    assert restored
    assert set(names) == set(lift_fast.__all__)
    kinds = {name: "type" if name[0].isupper() else "str" if name == "__version__" else "function" for name in names}
    assert {name: kind for name, kind in names.items() if kind != kinds[name]} == {}


def test_submodules_come_at_their_first_use():
    code = """
        import json, lift_fast
        shown = [dir(lift_fast), dir(lift_fast.training), dir(lift_fast.evaluation)]
        found = [lift_fast.losses.LOSSES, lift_fast.evaluation.spair.fit, lift_fast.evaluation.davis.jaccard,
                 lift_fast.evaluation.cost, lift_fast.images.set_max_pixels, lift_fast.show.draw_sheet,
                 lift_fast.training.train]
        missing = [hasattr(lift_fast, "nonsense"), hasattr(lift_fast.evaluation, "nonsense")]
        print(json.dumps([shown, missing, callable(lift_fast.backends)]))
    """
    (package, training, evaluation), missing, function = python(code)
    assert {"training", "evaluation", "show", "images", "demonstration", "match_images"} <= set(package)
    assert {"train", "split", "TrainingSettings"} <= set(training)
    assert {"spair", "davis", "discovery", "cka", "warp", "cost"} <= set(evaluation)
    assert missing == [False, False]
    assert function


def test_a_pickle_is_read_without_another_import():
    code = """
        import json, pickle, sys
        value = pickle.loads(bytes.fromhex(sys.argv[1]))
        print(json.dumps([type(value).__module__, value.similarity.tolist()]))
    """
    result = lift_fast.nearest(torch.eye(2), torch.eye(2))
    assert python(code, pickle.dumps(result).hex()) == ["lift_fast.matching", [[1.0], [1.0]]]


def test_a_name_may_be_used_first_inside_a_compiled_function():
    code = """
        import json
        import torch
        import lift_fast

        @torch.compile(fullgraph=True, backend="eager")
        def matched(rows):
            return lift_fast.nearest(rows, rows).index.flatten()

        print(json.dumps(matched(torch.eye(3)).tolist()))
    """
    assert python(code) == [0, 1, 2]


def test_start_of_the_process():
    begun = time.time()
    code = """
        import time
        from lift_fast.cli.clock import process_start
        print(time.time() - (time.perf_counter() - process_start()))
    """
    found = python(code)
    # The system counts hundredths of a second.
    assert begun - 0.02 <= found <= time.time()


@pytest.mark.parametrize("stat", ["", "1 (a b) S", "1 (a) S " + "0 " * 40, "1 (a) S " + "99999999999999 " * 40])
def test_an_implausible_start_is_the_import(stat, monkeypatch, tmp_path):
    file = tmp_path / "stat"
    file.write_text(stat)
    monkeypatch.setattr(clock, "Path", lambda path: file)
    if stat and os.path.exists("/proc/uptime"):
        # A machine that started just now would make zero plausible.
        monkeypatch.setattr(clock, "_MOST_SECONDS", 0.001)
    assert clock.process_start() == clock._IMPORTED
