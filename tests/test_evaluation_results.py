"""Intervals, hashes, JSON and tables of evaluations."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from lift_fast.evaluation.results import (
    Estimate,
    bootstrap,
    load_json,
    provenance,
    read_json,
    save_json,
    sha256,
)
from lift_fast.evaluation.tables import Column, Table, escape_latex


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = random.exponential(2.0, (400, 60, 1))
    hits = [e[0].low <= 2.0 <= e[0].high for e in (bootstrap(s, resamples=400) for s in samples)]
    # 95 % asked for; a percentile bootstrap of 60 skewed values keeps about 93. Five standard deviations of the count.
    assert 0.87 < np.mean(hits) < 0.99


def test_bootstrap_agrees_with_resampling_row_by_row():
    values = np.random.default_rng(1).normal(size=(25, 3))
    ours = bootstrap(values, resamples=20000)
    random = np.random.default_rng(2)
    means = np.array([values[random.integers(25, size=25)].mean(0) for _ in range(20000)])
    for k, estimate in enumerate(ours):
        assert estimate.value == pytest.approx(values[:, k].mean())
        # The percentiles of 20,000 draws scatter by about 0.003.
        assert [estimate.low, estimate.high] == pytest.approx(np.percentile(means[:, k], [2.5, 97.5]), abs=0.03)


def test_bootstrap_of_too_few_rows_has_no_interval():
    (one,) = bootstrap([[4.0]])
    assert one.value == 4
    assert np.isnan(one.low)
    assert bootstrap(np.empty((0, 2))) == []


def test_json_round_trip(tmp_path):
    path = tmp_path / "r.json"
    save_json(path, {"protocol": "x", "value": np.float32(0.5), "nan": float("nan"), 3: [np.int64(2), (1, 2)]})
    assert load_json(path, "x") == {"protocol": "x", "value": 0.5, "nan": None, "3": [2, [1, 2]]}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"is not a file of results of y: it holds results of x"):
        load_json(path, "y")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a file of results of an evaluation"):
        load_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        load_json(path)
    with pytest.raises(FileNotFoundError, match="no file of results at"):
        load_json(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_json(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_is_read_in_each_of_its_encodings(encoding, tmp_path):
    path = tmp_path / "annotation.json"
    path.write_bytes('{"name": "é"}'.encode(encoding))
    assert read_json(path, "annotation") == {"name": "é"}
    path.write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"annotation\.json is not a JSON file \('utf-8' codec"):
        read_json(path, "annotation")


def test_provenance_hashes_files(tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(b"weights" * 1000)
    found = provenance("cpu", {"lift": file, "other": "module:callable", "none": None})
    assert found["weights"] == {
        "lift": {"file": "w.pth", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "other": {"file": "module:callable", "sha256": None},
    }
    assert sha256(file) == found["weights"]["lift"]["sha256"]
    assert json.dumps(found)


def test_tables():
    columns = [Column("PCK"), Column("error_px", "low", 2), Column("difference", "")]
    rows = [("one", [Estimate(50.04, 45, 55), 3.0, None]), ("two_b", [Estimate(49.96, 44, 56), 3.001, 1.0])]
    text = Table("title", columns, rows).markdown()
    # Equal as printed, so both are bold.
    assert "| one | **50.0** [45.0, 55.0] | **3.00** |  |" in text
    assert "| two_b | **50.0** [44.0, 56.0] | **3.00** | 1.0 |" in text
    latex = Table("title", columns, rows).latex()
    assert r"two\_b & \textbf{50.0} [44.0, 56.0] & \textbf{3.00} & 1.0 \\" in latex
    assert r"PCK & error\_px & difference" in latex


def test_the_best_is_sought_within_each_set():
    columns = [Column("high"), Column("low", "low"), Column("none", "")]
    rows = [(name, [value, value, value]) for name, value in zip("abcde", (1.0, 2.0, 3.0, 4.0, 9.0), strict=True)]
    lines = Table("t", columns, rows, [0, 0, 1, 1, None]).markdown().splitlines()[4:]
    assert lines == [
        "| a | 1.0 | **1.0** | 1.0 |",
        "| b | **2.0** | 2.0 | 2.0 |",
        "| c | 3.0 | **3.0** | 3.0 |",
        "| d | **4.0** | 4.0 | 4.0 |",
        "| e | 9.0 | 9.0 | 9.0 |",
    ]
    # One row alone is no best.
    assert "**1" not in Table("t", columns, rows[:1], [3]).markdown()


def test_names_stay_in_their_cells():
    text = Table("t", [Column("x|y")], [("a|b\nc", [1.0])]).markdown()
    assert r"| method | x\|y |" in text
    assert r"| a\|b c | 1.0 |" in text
    # Alone, these would be an argument of the line before.
    for name in ("[a]", "(a)", "*a"):
        assert f"\n{{}}{name} & 1.0" in Table("t", [Column("x")], [(name, [1.0])]).latex()
    assert escape_latex("a_b%{}\\") == r"a\_b\%\{\}\textbackslash{}"
