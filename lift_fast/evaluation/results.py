"""Results of evaluations: JSON with everything that is needed to repeat them."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lift_fast._files import atomic_path

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """``[value, low, high]``, as JSON holds it."""
        return [self.value, self.low, self.high]

    @classmethod
    def of(cls, entry: Sequence[float | None] | None) -> Estimate | None:
        """From ``[value, low, high]`` of JSON; None without a value."""
        if entry is None or entry[0] is None:
            return None
        value, low, high = (math.nan if part is None else part for part in entry)
        return cls(value, low, high)


def as_estimate(value: Estimate | float) -> Estimate:
    """A figure with its interval; NaN for an interval that is not known."""
    return value if isinstance(value, Estimate) else Estimate(value, math.nan, math.nan)


def bootstrap(values: npt.ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate]:
    """Mean of each column of ``[rows, columns]`` with a 95 % percentile bootstrap interval over the rows.

    Rows are what was drawn independently, the images: points of one image fail together, so an interval over points
    would be too narrow. Columns are resampled together. Fewer than two rows give an interval of NaN.
    """
    table = np.asarray(values, dtype=np.float64)
    count = table.shape[0]
    if count < 2:
        return [Estimate(float(mean), math.nan, math.nan) for mean in table.mean(0)] if count else []
    # How often each row was drawn: a product instead of resampled copies.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    means = drawn @ table / count
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(table.mean(0), low, high, strict=True)]


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content in hexadecimal."""
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def provenance(device: str, files: dict[str, str | os.PathLike[str] | None]) -> dict[str, Any]:
    """What a result depends on in addition to its options: versions, machine, date, and the hash of each of ``files``.

    Entries of ``files`` that are not files, such as ``module:callable``, are recorded by name alone; None is left out.
    """
    from lift_fast import env_report

    report = env_report.report()
    weights = {
        name: {"file": os.path.basename(path), "sha256": sha256(path) if os.path.isfile(path) else None}
        for name, path in files.items()
        if path is not None
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": report["versions"],
        "platform": platform.platform(),
        "device": device,
        "cpu": report["cpu"],
        "weights": weights,
    }


def save_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a result, atomically; NaN becomes null. Raises ``FileNotFoundError`` without the folder."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(as_json(content)) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The content of a JSON file; ``what`` names it in messages, such as "file of results".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder or not JSON.
    """
    try:
        # Bytes: json detects UTF-8, 16 and 32, and drops a byte order mark.
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {what} at {path}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; expected a {what}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error


def load_json(path: str | os.PathLike[str], protocol: str | None = None) -> dict[str, Any]:
    """A result; if ``protocol`` is given, one of that protocol.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, not a result, or one of another protocol.
    """
    content: dict[str, Any] = read_json(path, "file of results")
    found = content.get("protocol") if isinstance(content, dict) else None
    if found is None or (protocol is not None and found != protocol):
        but = f": it holds results of {found}" if found else ""
        raise ValueError(f"{path} is not a file of results of {protocol or 'an evaluation'}{but}")
    return content


def as_json(value: Any) -> Any:
    """``value`` as it comes back from JSON, which has neither NaN nor NumPy's numbers."""
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
