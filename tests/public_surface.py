"""What users of the package rely on, as one JSON value: run as a program, it prints the one of this checkout.

``tests/public_surface.json`` is that of the release before; ``test_public_surface.py`` compares.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lift_fast
from lift_fast import _env
from lift_fast.cli import build_parser, main

PACKAGES = (
    "lift_fast",
    "lift_fast.backbones",
    "lift_fast.evaluation.davis",
    "lift_fast.evaluation.spair",
    "lift_fast.export",
    "lift_fast.show",
    "lift_fast.training",
)
# Names outside these packages' lists that README or docs show.
DOCUMENTED = (
    ("lift_fast.backbones.registry", "OFFICIAL"),
    ("lift_fast.evaluation", "published"),
    ("lift_fast.evaluation", "report"),
    ("lift_fast.evaluation", "runs"),
    ("lift_fast.evaluation.davis", "frames"),
    ("lift_fast.evaluation.tokencut", "tokencut"),
    ("lift_fast.images", "set_max_pixels"),
    ("lift_fast.testing", "poisoned_outputs"),
    ("lift_fast.training.step", "TrainingStep"),
)
# in_channels, patch_size and further arguments of the networks whose state dicts are compared.
NETWORKS: tuple[dict[str, Any], ...] = (
    {"in_channels": 384, "patch_size": 8},
    {"in_channels": 384, "patch_size": 16},
    {"in_channels": 768, "patch_size": 16, "extra_image_blocks": 1},
    {"in_channels": 6, "patch_size": 14, "use_image": False},
)


def surface() -> dict[str, Any]:
    """Public names with their arguments, operators, state-dict entries, commands with their options, and the rest."""
    return {
        "names": {package: _names(package) for package in PACKAGES},
        "documented": [f"{module}.{name}" for module, name in DOCUMENTED if _there(module, name)],
        "operators": _operators(),
        "state_dicts": [_entries(network) for network in NETWORKS],
        "commands": _commands(build_parser(), "lift-fast"),
        "environment": sorted(_env.VARIABLES),
        "parts": list(lift_fast.backends().as_dict()),
        "results": _results(),
    }


def _names(package: str) -> dict[str, Any]:
    module = importlib.import_module(package)
    return {name: _described(getattr(module, name)) for name in sorted(module.__all__) if name != "__version__"}


def _there(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
        return hasattr(found, name) or importlib.import_module(f"{module}.{name}") is not None
    except ImportError:
        return False


def _described(value: Any) -> Any:
    """Arguments of a function; arguments, public methods and attributes of a class; else the kind."""
    if inspect.isclass(value):
        own = {
            name: _arguments(member) if callable(member) or isinstance(member, (classmethod, staticmethod)) else "value"
            for name, member in sorted(vars(value).items())
            if not name.startswith("_")
        }
        fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())
        return {"arguments": _arguments(value), "members": own, "fields": list(fields)}
    return _arguments(value) if callable(value) else type(value).__name__


def _arguments(value: Any) -> list[str] | None:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    # Without the address of a function that is a default.
    return [re.sub(r" at 0x\w+", "", str(p.replace(annotation=inspect.Parameter.empty))) for p in parameters]


def _operators() -> list[str]:
    for module in ("lift_fast.matching", "lift_fast.losses", "lift_fast.propagation", "lift_fast.lift"):
        importlib.import_module(module)
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lift_fast::")}
    # Those that the tests define for themselves are not the package's.
    return sorted(
        str(getattr(torch.ops.lift_fast, name.removeprefix("lift_fast::").partition(".")[0]).default._schema)
        for name in found
        if "test" not in name
    )


def _entries(network: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in lift_fast.LiFT(**network).state_dict().items()}


def _commands(parser: argparse.ArgumentParser, name: str) -> dict[str, Any]:
    """Every command's options and arguments, each with what argparse makes of it."""
    found: dict[str, Any] = {name: {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found.update(_commands(below, f"{name} {word}"))
            continue
        found[name][", ".join(action.option_strings) or action.dest] = {
            # A flag's is the program's own affair.
            "default": None if action.nargs == 0 else _plain(action.default),
            "choices": None if action.choices is None else [_plain(choice) for choice in action.choices],
            "nargs": action.nargs,
            "required": action.required,
        }
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else type(value).__name__


def _results() -> dict[str, Any]:
    """Entries of what commands print and write, from runs on two tiny images."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder, "images"), Path(folder, "out")
        root.mkdir()
        out.mkdir()
        for number, name in enumerate(("a.png", "b.png")):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
        a, b = root / "a.png", root / "b.png"
        tiny = ["--model", "vit_tiny_patch16_224", "--random-weights", "--device", "cpu"]
        once = ["--size", "64", "--batch-size", "2", "--max-steps", "1"]
        for command in (
            ["info"],
            ["match", a, b, "--out", out / "match.png", *tiny, "--random-lift", "--size", "64"],
            ["extract", root, "--out", out / "extract", *tiny, "--random-lift", "--size", "64"],
            ["train", root, "--out", out / "train", *tiny, *once],
            ["eval", "cka", "--root", root, "--sizes", "32", "--reference", "64", *tiny, "--method", "backbone"],
            ["eval", "cost", *tiny, "--method", "backbone", "--sizes", "64"],
        ):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                status = main(
                    [str(word) for word in [*command, "--json", *(["--quiet"] if "--out" in command else [])]]
                )
            name = " ".join(str(word) for word in command[: 2 if command[0] == "eval" else 1])
            content = json.loads(printed.getvalue()) if status == 0 else f"exit status {status}"
            # What a machine has is no entry of ours.
            found[name] = sorted(content) if name == "info" else _shape(content)
        for path in sorted(out.rglob("*")):
            name = path.relative_to(out).as_posix()
            if path.suffix == ".npz":
                with np.load(path) as content:
                    found[name] = {key: [str(value.dtype), value.ndim] for key, value in content.items()}
            elif path.name == "last.pth":
                found[name] = _shape(torch.load(path, weights_only=True))
            elif path.suffix == ".csv":
                found[name] = path.read_text().splitlines()[0]
            elif path.is_file():
                found[name] = "a file"
    return found


def _shape(value: Any) -> Any:
    """Names and types of what is in a value, not the numbers; of a list its first entry."""
    if isinstance(value, dict):
        return {str(name): _shape(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shape(part) for part in value[:1]]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def lines(value: Any, depth: int = 3) -> str:
    """JSON with a line for each entry of the outer ``depth`` levels, so that a difference can be read."""
    if depth and isinstance(value, dict) and value:
        return (
            "{\n" + ",\n".join(f"{json.dumps(name)}: {lines(part, depth - 1)}" for name, part in value.items()) + "\n}"
        )
    return json.dumps(value)


if __name__ == "__main__":
    print(lines(surface()))
