"""A C++ compiler that keeps its objects: ``CXX="python tests/compiler_cache.py FOLDER g++" pip install .``

Several builds of the native core in one run, as CI makes them, then compile each source once. An object is taken again
if the preprocessed source, the flags and the compiler are the same, wherever the source lies.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def main(folder: Path, command: list[str]) -> int:
    """Compile, or take the object from ``folder``; the exit status."""
    target, listed = option(command, "-o"), option(command, "-MF")
    if "-c" not in command or target is None:
        return subprocess.run(command, check=False).returncode
    # What headers say counts, and not where they lie; the list for -MF is written meanwhile.
    at = command.index("-o")
    preprocess = [*command[:at], *command[at + 2 :], "-MT", target, "-E", "-P"]
    preprocessed = subprocess.run(preprocess, capture_output=True, check=False)
    if preprocessed.returncode:
        return subprocess.run(command, check=False).returncode
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    places = {option(command, "-c"), target, listed}
    flags = [part for part in command if part not in places and not part.startswith("-I")]
    key = hashlib.sha256(version + repr(flags).encode() + preprocessed.stdout).hexdigest()
    kept = folder / f"{key}.o"
    if not kept.exists():
        done = subprocess.run(command, check=False)
        if done.returncode:
            return done.returncode
        folder.mkdir(parents=True, exist_ok=True)
        put(Path(target), kept)
    put(kept, Path(target))
    os.utime(target)
    return 0


def put(source: Path, target: Path) -> None:
    """Copy in one step: others may read or write the same."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(source.read_bytes())
    Path(file.name).replace(target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
