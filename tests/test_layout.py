"""The house: imports run downwards and never in circles, and a file stays one idea that can be read at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; what stands in a row may import from its own row and from those before.
FLOORS = (
    "_checkout _env _exporting _text _threads checks defaults demonstration layers locks memory precision untouched "
    "witnesses",
    "_files _native alignment confidence geometry interpreter drawing match_field match_files testing",
    "_interrupts images kernels lift_state tensor_files trust",
    "devices distributed ops",
    "_operators lift losses matching propagation",
    "backbones backends checkpoints env_report tuning",
    "extractor",
    "export graphs image_matching image_stream map_cache tracking training",
    "lift_fast",
    "evaluation show",
    "cli",
    "__main__",
)
MOST_LINES = 600


def modules() -> dict[str, Path]:
    """Every module's name below ``lift_fast``, without that, and its file."""
    found = {}
    for folder, prefix in ((ROOT / "lift_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            # An editable install may show the kernels' folder a second time.
            if prefix or parts[0] != "kernels":
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lift_fast"] = path
    return found


MODULES = modules()


def imported(name: str, text: str | None = None) -> Iterator[str]:
    """Modules that one imports, at once, within a function or for type checkers."""
    path = MODULES[name]
    own = [] if name == "lift_fast" else name.split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*(["lift_fast", *base] if node.level else []), *([node.module] if node.module else [])])
            found = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            if target.partition(".")[0] == "lift_fast":
                inner = target.removeprefix("lift_fast").removeprefix(".") or "lift_fast"
                # What is no module is a name of the one above.
                above = inner.rpartition(".")[0] or "lift_fast"
                yield inner if inner in MODULES else above


GRAPH = {name: {target for target in imported(name) if target != name} for name in MODULES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of ``graph``, first module repeated at its end; [] if there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if found := walk(target, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def unit(name: str) -> str:
    return name.partition(".")[0]


def test_no_circles():
    assert circle(GRAPH) == []


def test_no_circles_of_folders():
    folders: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        folders.setdefault(unit(name), set()).update(map(unit, targets))
    assert circle({name: targets - {name} for name, targets in folders.items()}) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    lazy = "def f():\n    from ..kernels import launch\n    import lift_fast.lift\n"
    assert list(imported("ops.library", lazy)) == ["kernels.launch", "lift"]
    assert list(imported("lift", "if TYPE_CHECKING:\n    from . import checks, LiFT\n")) == ["checks", "lift_fast"]


def test_every_folder_has_its_floor():
    known = " ".join(FLOORS).split()
    assert len(known) == len(set(known))
    assert set(map(unit, MODULES)) == set(known)


def test_imports_run_downwards():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
    upwards = [
        f"{name} imports {target}"
        for name, targets in sorted(GRAPH.items())
        for target in sorted(targets)
        # The package itself shows names of every floor, most of them when they are first asked for.
        if name != "lift_fast" and floor[unit(name)] < floor[unit(target)]
    ]
    assert upwards == []


@pytest.mark.parametrize("operator", ["dense_match", "lift_forward", "nearest"])
def test_an_operator_stands_above_its_backends(operator):
    parts = {name.rpartition(".")[2]: name for name in MODULES if name.startswith(f"ops.{operator}.")}
    assert {"op", "plain", "cpu", "gpu"} <= set(parts)
    for part, name in parts.items():
        inside = {target.rpartition(".")[2] for target in GRAPH[name] if target in parts.values()}
        assert part == "op" or "op" not in inside
        if part in ("plain", "cpu"):
            assert not inside & ({"cpu", "gpu", "cuda"} - {part})


def test_files_are_short():
    long = {}
    for folder in ("lift_fast", "kernels", "csrc", "bench", "tests", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".hpp", ".cu", ".cuh"):
                count = path.read_text().count("\n")
                if count > MOST_LINES:
                    long[str(path.relative_to(ROOT))] = count
    assert long == {}
