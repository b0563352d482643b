"""README, CONTRIBUTING, the pages in docs/ and the files in .github/ name what the repository holds."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import lift_fast
from lift_fast import _env
from lift_fast.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".github/pull_request_template.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FOLDERS = ("bench", "csrc", "docs", "examples", "kernels", "lift_fast", "tests", ".ci", ".github")
SOURCE = (".py", ".cpp", ".hpp", ".cu", ".cuh", ".sh", ".toml", ".in")
# DINO's program, which docs/evaluation_davis.md names.
ELSEWHERE = {"eval_video_segmentation.py"}
# Options of pytest and of the published code that stand without their program.
OPTIONS_ELSEWHERE = {"--augment", "--pdb"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    return (found.groups() for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))


def spans(page: Path) -> list[str]:
    """Text between backticks, outside fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command in a block of shell lines; the parts of a pipe or a chain are commands of their own."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in re.split(r" \| | && ", line):
            if words := shlex.split(part, comments=True):
                yield words


def blocks(page: Path) -> Iterator[list[str]]:
    """Words of every command in the page's blocks."""
    for language, text in fences(page):
        if not language:
            yield from commands(text)


def own_arguments(words: list[str]) -> list[str] | None:
    """What follows ``lift-fast`` or ``-m lift_fast``; None for other programs."""
    if words[0] == "lift-fast":
        return words[1:]
    if "lift_fast" in words and words[words.index("lift_fast") - 1] == "-m":
        return words[words.index("lift_fast") + 1 :]
    return None


def subparser(words: list[str]) -> argparse.ArgumentParser:
    """The parser of the longest command that the words begin with."""
    parser = build_parser()
    for word in words:
        choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not choices or word not in choices[0]:
            break
        parser = choices[0][word]
    return parser


def known_options(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a parser and of the commands below it."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(known_options, action.choices.values()))
    return found


def options(words: list[str]) -> list[str]:
    return [found[0] for word in words if (found := re.match(r"--[a-z][\w-]*", word))]


def is_there(name: str) -> bool:
    """Whether a path exists, from the root or any folder of the repository; X and * stand for any name."""
    pattern = re.sub(r"(?<![A-Z])X(?![A-Z])", "*", name).rstrip("/")
    if name.split("/")[0] in FOLDERS:
        return any(ROOT.glob(pattern))
    return any(any(folder.rglob(pattern)) for folder in map(ROOT.joinpath, FOLDERS)) or any(ROOT.glob(pattern))


def path_like(word: str) -> bool:
    return word.endswith(SOURCE) or ("/" in word and word.split("/")[0] in FOLDERS)


@each_page
def test_paths_exist(page):
    named = [word.strip(".,;:()") for span in spans(page) for word in re.sub("<[^>]*>", "X", span).split()]
    for words in blocks(page):
        named += [word for before, word in zip(["", *words], words, strict=False) if before != "--out"]
    missing = [word for word in named if path_like(word) and word not in ELSEWHERE and not is_there(word)]
    assert not missing


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@each_page
def test_names_import(page):
    text = "\n".join([*spans(page), *(block for _, block in fences(page))])
    for name in set(re.findall(r"(?<![\w./-])lift_fast(?:\.[A-Za-z_]\w*)+", text)):
        value = lift_fast
        parts = name.split(".")
        for count, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:count]))
            value = getattr(value, part)


@each_page
def test_python_blocks_compile_and_import(page):
    for language, text in fences(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "lift_fast":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_the_tables_names_are_public():
    table = (ROOT / "README.md").read_text("utf-8").split("| name | what it is |\n")[1].split("\n\n")[0]
    first = "\n".join(row.split(" | ")[0] for row in table.splitlines())
    names = re.findall(r"`(?:training\.)?(\w+)\(", first)
    assert len(names) > 12
    for name in names:
        assert name in lift_fast.__all__ or name in importlib.import_module("lift_fast.training").__all__, name


@each_page
def test_command_lines_are_taken(page):
    for words in blocks(page):
        arguments = own_arguments(words)
        if arguments is not None and "[" not in " ".join(words):
            # Raises SystemExit for a command line that is wrong; an abbreviated option would pass.
            build_parser().parse_args(arguments)
            assert set(options(arguments)) <= known_options(subparser(arguments)), words


@each_page
def test_options_are_known(page):
    every = known_options(build_parser())
    programs = [*(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "tests").glob("[!t]*.py")]
    others = "\n".join(path.read_text("utf-8") for path in programs)
    for span in spans(page):
        words = re.sub(r"[\[\]|]", " ", span).split()
        arguments = words if words[:1] == ["eval"] else own_arguments(words or [""])
        if arguments is not None:
            unknown = set(options(words)) - known_options(subparser(arguments))
        elif words and words[0].startswith("--"):
            ours = every | OPTIONS_ELSEWHERE
            unknown = {option for option in options(words) if option not in ours and f'"{option}"' not in others}
        else:
            continue
        assert not unknown, span


def test_programs_of_the_repository_know_their_options():
    checked = 0
    for page in PAGES:
        for words in blocks(page):
            if words[:2] == ["python", "-m"] and words[2].startswith("bench."):
                program = ROOT / f"{words[2].replace('.', '/')}.py"
            elif words[0] == "python" and words[1].endswith(".py"):
                program = ROOT / words[1]
            else:
                continue
            text = program.read_text("utf-8")
            for option in options(words):
                assert f'"{option}"' in text, words
                checked += 1
    assert checked > 5


def test_variables_of_the_environment_are_read():
    read = (ROOT / "setup.py").read_text("utf-8")
    named = {
        name for page in [*PAGES, *FORMS] for name in re.findall(r"LIFT_FAST_[A-Z_]*[A-Z]\b", page.read_text("utf-8"))
    }
    assert not [name for name in named if name not in _env.VARIABLES and name not in read]
    assert set(_env.VARIABLES) <= named


def programs() -> set[str]:
    """Programs of the system, of Python, PyTorch and COLMAP, and of the packages that pyproject.toml lists."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.findall(r'"([\w-]+)[><=~]', text)
    scripts = re.findall(r"^([\w-]+) = \"lift_fast", text, re.M)
    return {"bash", "colmap", "git", "pip", "python", "torchrun", "xargs", *listed, *scripts}


def extras_exist(words: list[str]) -> None:
    """Check that pyproject.toml has the extras of ``pip install '.[a,b]'``."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for word in words:
        for extra in (re.match(r"\.\[(.*)\]", word) or ["", ""])[1].split(","):
            assert not extra or re.search(rf"^{extra} = \[", text, re.M), word


@each_page
def test_programs_exist(page):
    for words in blocks(page):
        assert words[0] in programs(), words
        extras_exist(words)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "jobs"} <= set(workflow)
    for job in workflow["jobs"].values():
        installed: set[str] = set()
        for step in job["steps"]:
            assert len({"run", "uses"} & set(step)) == 1, step
            for words in commands(step.get("run", "")):
                assert words[0] in programs(), words
                extras_exist(words)
                if words[:2] == ["pip", "install"]:
                    installed.update(words[2:])
                if words[:2] == ["python", "-m"]:
                    assert words[2] in installed, words
            test = step.get("env", {}).get("CIBW_TEST_COMMAND")
            if test:
                ast.parse(shlex.split(test)[2])
    assert any("pytest" in step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])


@pytest.mark.parametrize(
    "path", [*FORMS, ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_forms_parse(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    if path in FORMS and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(form)
        identities = [field["id"] for field in form["body"]]
        assert len(set(identities)) == len(identities)
        assert all(field["attributes"]["label"] for field in form["body"])


# The table of docs/evaluation.md: where published commands do something else.
DIFFERENCES = (ROOT / "docs/evaluation.md").read_text("utf-8")
COMMANDS = {
    "DAVIS": ["eval", "davis", "--root", "x"],
    "Discovery": ["eval", "discovery", "--root", "x", "--dataset", "voc07"],
    "SPair": ["eval", "spair", "--root", "x"],
    "LiFT": ["eval", "davis", "--root", "x"],
    "Training": ["train", "x", "--out", "y"],
}


def rows() -> Iterator[tuple[str, str]]:
    table = DIFFERENCES.split("| what | published | ours | why | for the published one |\n")[1].split("\n\n")[0]
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
