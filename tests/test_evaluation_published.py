"""Published numbers: those that ship with the package, and files of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from evaluation_data import number, numbers

from lift_fast.backbones import load_backbone
from lift_fast.evaluation import cost
from lift_fast.evaluation.metrics import METRICS, metric_of
from lift_fast.evaluation.published import SHIPPED, load_published

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs" / "evaluation_report.md"


def test_shipped_numbers_are_sound():
    published = load_published()
    assert len(published.entries) > 50
    used = {name for entry in published.entries for name in entry.sources}
    assert used == set(published.sources)
    for source in published.sources.values():
        assert source.arxiv == "2403.14625"
        assert source.place
        assert source.read_from
    for entry in published.entries:
        assert entry.sources
        metric = metric_of(entry.protocol, entry.metric)
        assert metric.lowest <= entry.value <= metric.highest
        # Percent, not shares: no published number is below a third of a percent.
        assert metric.highest != 100 or entry.value > 0.3
    # What the paper's own figure shows is not left to quotations.
    own = {(e.protocol, e.backbone, e.method, e.metric, e.size): e.value
           for e in published.entries if any(not published.sources[name].quoted for name in e.sources)}  # fmt: skip
    assert own["spair", "dino_vits16", "lift", "PCK@0.1", 224] == 28.68
    assert own["spair", "dino_vits16", "backbone", "PCK@0.1", 448] == 28.60
    assert own["cost", "dino_vits16", "lift", "GFLOPs as published", 224] == 5.30


@pytest.mark.parametrize("model", ["dino_vits16", "dino_vitb16"])
def test_shipped_costs_are_what_the_count_gives(model):
    backbone = load_backbone(model, random_weights=True, head_order="interleaved")
    checked = 0
    for entry in load_published().entries:
        if entry.protocol == "cost" and entry.backbone == model:
            found = cost.method_cost(entry.method, backbone, entry.size)
            if entry.metric == "GFLOPs as published":
                # The paper rounds to two digits, the last of which may be cut.
                assert found.published_gflops == pytest.approx(entry.value, abs=0.01)
                checked += 1
    assert checked


BROKEN = {
    "list": ([], "the file must be an object, got list"),
    "format": (numbers(format=2), '"format" must be 1, got 2'),
    "entries": (numbers(entries={}), '"entries" a list'),
    "missing": ({"format": 1, "sources": {}}, 'the file has no "entries"'),
    "unknown": (numbers(number(), note="x"), "the file has an unknown 'note'"),
    "source": (numbers(sources={"here": {"paper": "A"}}), "source 'here' has no \"place\""),
    "quoted": (
        numbers(sources={"a": {"paper": "A", "place": "B", "read_from": "C", "quoted": "no"}}),
        "must be true or false, got 'no'",
    ),
    "paper": (
        numbers(sources={"a": {"paper": " ", "place": "B", "read_from": "C", "quoted": True}}),
        "line of text",
    ),
    "text": (numbers(number(label="")), 'entry 1: "label" must be a line of text'),
    "protocol": (
        numbers(number(), number(protocol="ap")),
        'entry 2: "protocol" must be one of warp, spair',
    ),
    "metric": (numbers(number(metric="J-Mean")), "entry 1: spair has no metric 'J-Mean'"),
    "share": (numbers(number(value=133)), "PCK@0.1 must lie from 0 to 100, got 133"),
    "value": (numbers(number(value="33")), "\"value\" must be a number, got '33'"),
    "truth": (numbers(number(value=True)), '"value" must be a number, got True'),
    "huge": (numbers(number(metric="median", value=10**400)), "too large"),
    "nan": (numbers(number(value=float("nan"))), '"value" must be a number, got nan'),
    "size": (numbers(number(size=0)), '"size" must be a number of pixels or null, got 0'),
    "no source": (numbers(number(sources=[])), '"sources" must name at least one source'),
    "lost source": (numbers(number(sources=["there"])), "there is no source 'there'; there are here"),
    "extra": (numbers(number(unit="%")), "entry 1 has an unknown 'unit'"),
    "twice": (
        numbers(number(), number(value=1)),
        "entry 2 repeats entry 1: Mine, PCK@0.1",
    ),
    "dataset": (numbers(number(dataset=3)), '"dataset" must be a line of text'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_of_published_numbers_are_refused(case, tmp_path):
    content, message = BROKEN[case]
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"numbers\.json: .*{re.escape(message)}.*docs/evaluation_report\.md"):
        load_published(tmp_path / "numbers.json")


def test_files_of_published_numbers_that_are_no_json(tmp_path):
    (tmp_path / "numbers.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        load_published(tmp_path / "numbers.json")
    with pytest.raises(FileNotFoundError, match="no file of published numbers at"):
        load_published(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_published(tmp_path)


@pytest.mark.skipif(not DOCUMENTATION.is_file(), reason="runs from a checkout")
def test_the_documented_example_is_valid(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.S)
    (tmp_path / "example.json").write_text(example)
    (found,) = load_published(tmp_path / "example.json").entries
    assert (found.protocol, found.dataset, found.size) == ("discovery", "voc07", 224)


def test_metrics_are_told_apart():
    names = ["PCK@0.1", "median", "J-Mean", "CorLoc", "mean IoU", "CKA", "pooled CKA", "GFLOPs", "ms"]
    for name in names:
        fitting = [metric for metric in METRICS if re.fullmatch(metric.pattern, name)]
        assert len(fitting) == 1
    assert metric_of("warp", "PCK@1e-05") is not None
    assert metric_of("spair", "PCK@") is None
    assert metric_of("davis", "PCK@0.1") is None


def test_the_shipped_file_is_beside_the_module():
    assert SHIPPED.is_file()
    assert SHIPPED.parent.name == "evaluation"
