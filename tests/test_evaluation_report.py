"""Reports: every protocol's results read back, unlike runs told apart, published numbers, what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lift_fast.backbones import load_backbone
from lift_fast.cli import main
from lift_fast.evaluation import cost, report
from lift_fast.evaluation import warp as warp_protocol
from lift_fast.evaluation.charts import Series, line_chart
from lift_fast.evaluation.davis import SequenceScores
from lift_fast.evaluation.davis import summary as davis_report
from lift_fast.evaluation.discovery import Prediction, corloc
from lift_fast.evaluation.discovery.dataset import COCO_LIST, read_coco, read_voc
from lift_fast.evaluation.metrics import METRICS, metric_of
from lift_fast.evaluation.published import SHIPPED, load_published
from lift_fast.evaluation.results import Estimate, save_json
from lift_fast.evaluation.runs import read_run

METHODS = ("backbone", "lift")
DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs" / "evaluation_report.md"


def record(**changes):
    return {
        "model": "dino_vits16",
        "random_weights": False,
        "facet": "key",
        "layer": 11,
        "stride": 16,
        "dtype": "float32",
        "seed": 0,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.15.0", "lift_fast": "0.1.0"},
        "platform": "Linux",
        "device": "cpu",
        "cpu": "a processor",
        "weights": {
            "backbone": {"file": "dino.pth", "sha256": "ab" * 32},
            "lift": {"file": "lift.pth", "sha256": "cd" * 32},
        },
        **changes,
    }


def warp(seed=0, sizes=(112, 224), names=("x.png", "y.png", "z.png"), **changes):
    """A result of the warp protocol with random scores, summarised by the protocol itself."""
    random = np.random.default_rng(seed)
    options = {
        "methods": list(METHODS),
        "sizes": list(sizes),
        "seeds": 1,
        "points": 100,
        "alphas": [0.1, 0.05],
        "photometric": True,
        "reference": "backbone",
        "photographs": list(names),
    }
    scores = {
        "0": {str(s): {m: {n: random.random(4).tolist() for n in names} for m in METHODS} for s in sizes},
    }
    content = {
        "protocol": "warp",
        "complete": True,
        "options": options,
        "record": record(**changes),
        "scores": scores,
        "skipped": {},
    }
    content["summary"] = warp_protocol.summarise(content)
    return content


def spair(base=20.0, **changes):
    summary = {
        str(size): {
            method: {
                "PCK@0.1": [base + 3 * n + size / 100, base - 1, base + 9],
                "PCK@0.05": [base / 2 + n, None, None],
                "PCK@0.1 per image": base + n,
                "seed_std": None,
                "categories": {"cat": {"PCK@0.1": 7.0}},
            }
            for n, method in enumerate(METHODS)
        }
        for size in (112, 224)
    }
    return {
        "protocol": "spair",
        "complete": True,
        "options": {"methods": list(METHODS), "sizes": [112, 224], "alphas": [0.1, 0.05], "split": "test"},
        "record": record(**changes),
        "skipped": {},
        "summary": {"sizes": summary, "pairs": {"cat": 900, "dog": 900}, "left_out": 0},
    }


def davis(size=224, **changes):
    random = np.random.default_rng(3)
    scores = {
        method: [SequenceScores("dance", ("1", "2", "3"), random.random((2, 3)), random.random((2, 3)))]
        for method in METHODS
    }
    options = {"subset": "val", "year": "2017", "resolution": "480p", "sequences": ["dance"]}
    if size is not None:
        options.update(size=size, queue=7, radius=12, topk=5, temperature=0.1)
    return davis_report.content(scores, {}, options, record(**changes) if size is not None else {})


def discovery(resolution=224, dataset="coco20k"):
    found = [Prediction(f"{n}.jpg", (0, 0, 1, 1), 0.1 * n, False, False) for n in range(9)]
    options = {"dataset": dataset, "methods": list(METHODS), "tau": 0.3, "eps": 1e-5, "resolution": resolution}
    summary = {method: corloc(found[n:]) for n, method in enumerate(METHODS)}
    return {
        "protocol": "discovery",
        "options": options,
        "record": record(),
        "summary": summary,
        "skipped": {"a.jpg": "broken"},
        "predictions": {},
    }


def cka(grid=28):
    curve = {str(s): {"cka": [0.5 + s / 1000, 0.4, 0.9], "pooled": 0.25} for s in (56, 112)}
    curves = {"backbone": curve, "lift": {**curve, "112": {"cka": [None, None, None], "pooled": None}}}
    return {
        "protocol": "cka",
        "estimator": "linear, biased",
        "reference": 448,
        "sizes": [56, 112],
        "grid": grid,
        "pictures": 4,
        "curves": curves,
        "skipped": {},
        "record": record(),
    }


def costs(milliseconds=None, **changes):
    entries = [
        cost.Cost(method, size, (14, 14), 21_665_664 + 1_187_280 * n, 2.0 * n + size / 50, 4.34, milliseconds)
        for n, method in enumerate(METHODS)
        for size in (112, 224)
    ]
    return {**cost.as_content(entries), "record": record(**changes)}


MAKERS = {"warp": warp, "spair": spair, "davis": davis, "discovery": discovery, "cka": cka, "cost": costs}


@pytest.fixture
def saved(tmp_path):
    """Save a result under a name and read it as a run."""

    def save(name, content):
        save_json(tmp_path / f"{name}.json", content)
        return read_run(tmp_path / f"{name}.json")

    return save


def one_group(*runs, **options):
    (group,) = report.build(runs, **options).groups
    return group


def value(group, run, method, metric, size):
    (row,) = (row for row in group.rows if (row.run, row.method) == (run, method))
    return row.cells.get((metric, size))


def test_warp_figures_are_those_of_the_summary(saved):
    content = warp(5)
    group = one_group(saved("one", content))
    for size in (112, 224):
        for method in METHODS:
            for metric in ("PCK@0.1", "PCK@0.05", "median"):
                expected = content["summary"]["sizes"][str(size)][method][metric]
                assert value(group, "one", method, metric, size).as_list() == pytest.approx(expected)
    order = [("PCK@0.1", 112), ("PCK@0.1", 224), ("PCK@0.05", 112), ("PCK@0.05", 224), ("median", 112), ("median", 224)]
    assert list(group.columns) == order


def test_davis_discovery_cka_and_cost_figures(saved):
    content = davis()
    group = one_group(saved("d", content))
    assert value(group, "d", "lift", "J&F-Mean", 224) == pytest.approx(content["summary"]["lift"]["J&F-Mean"])
    assert [name for name, _ in group.columns] == ["J&F-Mean", "J-Mean", "F-Mean"]
    group = one_group(saved("f", discovery(None, "voc07")))
    assert value(group, "f", "backbone", "CorLoc", None) == 0
    assert value(group, "f", "backbone", "mean IoU", None) == pytest.approx(0.4)
    assert group.title == "Object discovery, voc07"
    group = one_group(saved("c", cka()))
    assert value(group, "c", "backbone", "CKA", 112) == Estimate(0.612, 0.4, 0.9)
    assert value(group, "c", "lift", "CKA", 112) is None
    group = one_group(saved("k", costs(3.5)))
    assert value(group, "k", "lift", "parameters, M", 112) == pytest.approx(22.852944)
    assert value(group, "k", "lift", "GFLOPs", 224) == pytest.approx(6.48)
    assert value(group, "k", "lift", "ms", 224) == 3.5


def test_all_protocols_in_one_report(saved):
    found = report.build([saved(name, make()) for name, make in MAKERS.items()], load_published())
    assert [group.protocol for group in found.groups] == list(MAKERS)
    text = found.markdown()
    for group in found.groups:
        assert f"**{group.title}**" in text
    # Every row of every table has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert json.loads(json.dumps(found.as_content()))["protocol"] == "report"


def test_other_metrics_can_be_asked_for(saved):
    runs = [saved("d", davis()), saved("w", warp())]
    found = report.build(runs, metrics=["J-Decay", "J-Mean"])
    assert [group.columns for group in found.groups] == [(("J-Decay", 224), ("J-Mean", 224))]
    group = one_group(saved("s", spair(20)), metrics=["PCK@0.1 per image", "PCK@0.1"])
    assert [name for name, _ in group.columns] == ["PCK@0.1 per image"] * 2 + ["PCK@0.1"] * 2
    assert value(group, "s", "lift", "PCK@0.1 per image", 112) == 21
    with pytest.raises(ValueError, match=r"no run has the metric 'AP'; there are J&F-Mean"):
        report.build(runs, metrics=["AP"])


def bold(found):
    """(run, method) of bold cells by column of a report of one group."""
    lines = [line for line in found.markdown().splitlines() if line.startswith("| ")][2:]
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    return [[row[0] for row in cells if row[n + 1].startswith("**")] for n in range(len(found.groups[0].columns))]


def test_the_best_is_bold_among_like_runs(saved):
    one, two = saved("one", spair(20)), saved("two", spair(25, seed=1))
    found = report.build([one, two])
    assert not found.groups[0].unlike
    assert bold(found) == [["two: lift"]] * 4


def test_all_pairs_are_called_all(saved):
    runs = []
    for name, count in (("whole", None), ("drawn", 100)):
        content = spair(20)
        content["options"]["pairs_per_category"] = count
        runs.append(saved(name, content))
    assert "pairs_per_category: all (whole), 100 (drawn)" in report.build(runs).markdown()


def test_unlike_runs_are_told_apart(saved):
    one, two = saved("one", warp(1)), saved("two", warp(2, names=("x.png", "q.png")))
    found = report.build([one, two])
    assert found.groups[0].unlike
    text = found.markdown()
    assert "UNLIKE RUNS" in text
    assert "photographs: [x.png, y.png, z.png] (one), [x.png, q.png] (two)" in text
    assert "number of photographs: 3 (one), 2 (two)" in text
    for names in bold(found):
        assert {name.partition(":")[0] for name in names} == {"one", "two"}


def test_long_lists_are_counted(saved):
    names = [f"{n}.png" for n in range(9)]
    runs = [saved("one", warp(1, names=names)), saved("two", warp(2, names=[*names[3:], "q.png"]))]
    other = warp(3, names=names)
    del other["options"]["photographs"]
    assert "photographs: 9 (one), 7 (two), 6 of them in all" in report.build(runs).markdown()
    text = report.build([*runs, saved("three", other)]).markdown()
    assert "photographs: 9 (one), 7 (two), not said (three), 6 of them in all" in text


UNLIKE = {
    "points": (warp(), lambda c: c["options"].update(points=50)),
    "davis": (davis(), lambda c: c["options"].update(topk=9)),
    "tau": (discovery(), lambda c: c["options"].update(tau=0.2)),
    "lattice": (cka(), lambda c: c.update(grid=14)),
    "photographs": (cka(), lambda c: c.update(options={"photographs": list("wxyz")})),
    "milliseconds": (costs(1.0), lambda c: c["record"].update(cpu="another")),
    "pairs": (spair(), lambda c: c["summary"].update(pairs={"cat": 17})),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_makes_runs_unlike(case, saved):
    content, change = UNLIKE[case]
    changed = copy.deepcopy(content)
    change(changed)
    assert one_group(saved("one", content), saved("two", changed)).unlike


LIKE = {
    "date": lambda c: c["record"].update(date="later"),
    "seed": lambda c: c["record"].update(seed=7),
    "cpu": lambda c: c["record"].update(cpu="another"),
    "weights": lambda c: c["record"]["weights"]["lift"].update(sha256="ef" * 32),
    "reference": lambda c: c["options"].update(reference=None),
}


@pytest.mark.parametrize("case", LIKE)
def test_what_leaves_runs_alike(case, saved):
    content = warp()
    changed = copy.deepcopy(content)
    LIKE[case](changed)
    assert not one_group(saved("one", content), saved("two", changed)).unlike


def test_data_sets_never_share_a_table(saved):
    found = report.build([saved("a", discovery()), saved("b", discovery(dataset="voc12"))])
    assert [group.dataset for group in found.groups] == ["coco20k", "voc12"]


def test_differences_in_networks_and_versions_are_listed(saved):
    other = record(seed=3, versions={"torch": "2.11.0", "lift_fast": "0.1.0"}, random_weights=True)
    other["weights"] = {"lift": {"file": "m:f", "sha256": None}}
    runs = [saved("one", spair()), saved("two", spair(**other))]
    found = {(d.kind, d.name): d.values for d in one_group(*runs).differences}
    assert found == {
        ("networks", "random_weights"): {"one": False, "two": True},
        ("networks", "seed"): {"one": 0, "two": 3},
        ("networks", "weights of lift"): {"one": "cd" * 32, "two": "m:f"},
        ("surroundings", "versions torch"): {"one": "2.15.0", "two": "2.11.0"},
    }
    text = report.build(runs).markdown()
    assert "weights of lift: cdcdcdcdcdcd (one), m:f (two)" in text
    assert "two: dino_vits16, RANDOM WEIGHTS, its figures mean nothing, pairs: 1800, left out: 0" in text


def test_masks_of_unknown_origin_and_skipped_pictures_are_said(saved):
    text = report.build([saved("masks", davis(None)), saved("found", discovery())]).markdown()
    assert "masks: masks or figures without a record of the networks behind them, sequences: 1, objects: 2" in text
    assert "found: dino_vits16, pictures: 8, 1 skipped" in text


def test_copies_are_recognised(saved):
    later = spair()
    later["record"]["date"] = "another day"
    assert (
        "copy and first hold the same result"
        in report.build([saved("first", spair()), saved("copy", later)]).markdown()
    )


def test_runs_of_one_name_or_file_are_refused(saved, tmp_path):
    run = saved("one", warp())
    with pytest.raises(ValueError, match=r"two runs are called 'one'; give names, NAME=FILE"):
        report.build([run, run])
    with pytest.raises(ValueError, match="is given twice"):
        report.build([run, read_run(tmp_path / "one.json", "other")])
    with pytest.raises(ValueError, match="at least one run"):
        report.build([])


def without(path):
    def change(content):
        *front, last = path
        for key in front:
            content = content[key]
        del content[last]

    return change


MALFORMED = {
    "unknown protocol": (
        warp,
        lambda c: c.update(protocol="ap"),
        "results of 'ap'; a report takes those of warp, spair",
    ),
    "no text": (warp, lambda c: c.update(protocol=["warp"]), "a report takes those of"),
    "report": (warp, lambda c: c.update(protocol="report"), "a report takes those of"),
    "interrupted": (
        warp,
        lambda c: (c.update(complete=False), c.pop("summary")),
        "interrupted; give its command again",
    ),
    "no summary": (spair, without(["summary"]), "not in their form .KeyError: 'summary'"),
    "summary": (spair, lambda c: c.update(summary=3), "not in their form"),
    "sizes": (spair, lambda c: c["summary"].update(sizes=[1]), "not in their form"),
    "size": (spair, lambda c: c["summary"]["sizes"].update(big={"lift": {"PCK@0.1": 3}}), "not in their form"),
    "truth": (spair, lambda c: c["summary"]["sizes"]["112"]["lift"].update({"PCK@0.1": True}), "expected a number"),
    "pair": (spair, lambda c: c["summary"]["sizes"]["112"]["lift"].update({"PCK@0.1": [1, 2]}), "not in their form"),
    "nothing": (spair, lambda c: c["summary"].update(sizes={}), "holds no figures"),
    "davis": (davis, without(["options", "subset"]), "not in their form"),
    "davis text": (davis, lambda c: c["summary"]["lift"].update({"J-Mean": "7"}), "expected a number, got '7'"),
    "discovery": (discovery, without(["summary", "lift", "corloc"]), "not in their form"),
    "cka": (cka, without(["curves"]), "not in their form"),
    "huge": (davis, lambda c: c["summary"]["lift"].update({"J-Mean": 10**400}), "not in their form"),
    "model": (warp, lambda c: c["record"].update(model=["x"]), "expected the name of a model"),
    "cost": (costs, lambda c: c["costs"].append({}), "not in their form"),
    "record": (warp, lambda c: c.update(record=[1]), "not in their form"),
    "weights": (warp, lambda c: c["record"].update(weights={"lift": "x"}), "not in their form"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_results_are_refused_with_their_file(case, saved):
    make, change, message = MALFORMED[case]
    content = make()
    change(content)
    with pytest.raises(ValueError, match=rf"odd\.json .*{message}"):
        saved("odd", content)


def test_numbers_that_are_none_are_refused(tmp_path):
    # Other programs write NaN and Infinity into JSON.
    content = discovery()
    content["summary"]["lift"]["corloc"] = float("nan")
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a number, got nan"):
        read_run(tmp_path / "odd.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', "\x00"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json (is no JSON file|holds no results)"):
        read_run(tmp_path / "odd.json")
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "gone.json")


def test_published_numbers_stand_in_matching_columns_alone(saved):
    found = report.build([saved("mine", spair(50))], load_published())
    (group,) = found.groups
    rows = {row.label: row for row in group.rows if row.run is None}
    lift = rows["DINO S/16 + LiFT"]
    assert lift.cells == {
        ("PCK@0.1", 112): 17.72,
        ("PCK@0.1", 224): 28.68,
        ("PCK@0.05", 112): 6.29,
        ("PCK@0.05", 224): 14.72,
    }
    assert lift.cited["PCK@0.1", 224] == ("lift-figure-1", "lift-ablation")
    # Another backbone's numbers stay out where the run's own are known.
    assert "DINO B/16" not in rows
    assert group.left_out == 5
    text = found.markdown()
    assert re.search(r"\| published: DINO S/16 \+ LiFT \[1, 2\] \| 17.72 \| 28.68 \| 6.29 \| 14.72 \|", text)
    numbers = re.findall(r"^\[(\d+)\] .*arXiv:2403\.14625", text, re.M)
    assert numbers == ["1", "2", "3"]
    assert not any("published" in name for names in bold(found) for name in names)
    assert "published" not in report.build([saved("again", spair(50))]).markdown()


def test_published_rows_are_never_bold_even_if_better(saved):
    found = report.build([saved("mine", spair(1))], load_published())
    assert bold(found)[:2] == [["mine: lift"]] * 2


def test_published_numbers_of_other_protocols(saved):
    runs = [
        saved(name, content) for name, content in (("d", davis()), ("f", discovery()), ("k", costs()), ("w", warp()))
    ]
    groups = {group.protocol: group for group in report.build(runs, load_published()).groups}
    rows = {p: {row.label: row.cells for row in g.rows if row.run is None} for p, g in groups.items()}
    assert rows["davis"]["DINO S/16 + LiFT"] == {("J&F-Mean", 224): 44.3}
    assert rows["discovery"]["DINO S/16 + LiFT"] == {("CorLoc", 224): 58.03}
    assert rows["cost"]["DINO S/16 + LiFT"] == {("GFLOPs as published", 224): 5.30, ("parameters, M", 224): 22.2}
    assert rows["warp"] == {}
    # Another size or data set has no published number here.
    year = davis()
    year["options"]["year"] = "2016"
    for other in (year, davis(480), discovery(None), discovery(dataset="voc07")):
        (group,) = report.build([saved("o", other)], load_published()).groups
        assert all(row.run is not None for row in group.rows)


def test_data_sets_are_known_by_what_published_numbers_call_them(tmp_path, saved):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text('{"images": [], "annotations": []}')
    names = tmp_path / COCO_LIST
    names.write_text("COCO_train2014_000000000009.jpg\n")
    (tmp_path / "mine.txt").write_text(names.read_text())
    run = saved("o", discovery(dataset=read_coco(tmp_path).name))
    assert run.dataset == "coco20k"
    (group,) = report.build([run], load_published()).groups
    assert any(row.label == "DINO S/16 + LiFT" for row in group.rows)
    # A list of one's own is another data set.
    assert saved("o", discovery(dataset=read_coco(tmp_path, names=tmp_path / "mine.txt").name)).dataset == "COCO mine"
    for year in (2007, 2012):
        base = tmp_path / f"VOC{year}" / "ImageSets" / "Main"
        base.mkdir(parents=True)
        (base / "trainval.txt").write_text("000001\n")
        for no_hard in (False, True):
            name = saved("o", discovery(dataset=read_voc(tmp_path, year, no_hard=no_hard).name)).dataset
            assert (name == f"voc{year % 100:02}") is not no_hard


def test_pictures_without_a_determined_cut_are_counted(saved):
    content = discovery()
    content["summary"]["lift"]["degenerate"] = 7
    group = one_group(saved("a", content))
    assert value(group, "a", "lift", "not determined", 224) == 7
    assert value(group, "a", "backbone", "not determined", 224) == 0


def test_other_backbones_are_said_to_be_others(saved):
    found = report.build([saved("mine", spair(model="demo_vitt16"))], load_published())
    assert "The published rows are of other backbones than the runs'" in found.markdown()
    assert found.groups[0].left_out == 0


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


def entry(**changes):
    return {
        "protocol": "spair",
        "label": "Mine",
        "method": "lift",
        "backbone": "dino_vits16",
        "metric": "PCK@0.1",
        "size": 112,
        "value": 33.3,
        "sources": ["here"],
        **changes,
    }


def table(*entries, **changes):
    source = {"paper": "A paper", "place": "Table 7", "read_from": "its PDF", "quoted": False}
    return {"format": 1, "sources": {"here": source}, "entries": list(entries), **changes}


BROKEN = {
    "list": ([], "the file must be an object, got list"),
    "format": (table(format=2), '"format" must be 1, got 2'),
    "entries": (table(entries={}), '"entries" a list'),
    "missing": ({"format": 1, "sources": {}}, 'the file lacks "entries"'),
    "unknown": (table(entry(), note="x"), "the file has an unknown 'note'"),
    "source": (table(sources={"here": {"paper": "A"}}), "source 'here' lacks \"place\""),
    "quoted": (
        table(sources={"a": {"paper": "A", "place": "B", "read_from": "C", "quoted": "no"}}),
        "must be true or false, got 'no'",
    ),
    "paper": (table(sources={"a": {"paper": " ", "place": "B", "read_from": "C", "quoted": True}}), "line of text"),
    "text": (table(entry(label="")), 'entry 1: "label" must be a line of text'),
    "protocol": (table(entry(), entry(protocol="ap")), 'entry 2: "protocol" must be one of warp, spair'),
    "metric": (table(entry(metric="J-Mean")), "entry 1: spair has no metric 'J-Mean'"),
    "share": (table(entry(value=133)), "PCK@0.1 must lie from 0 to 100, got 133"),
    "value": (table(entry(value="33")), "\"value\" must be a number, got '33'"),
    "truth": (table(entry(value=True)), '"value" must be a number, got True'),
    "huge": (table(entry(metric="median", value=10**400)), "too large"),
    "nan": (table(entry(value=float("nan"))), '"value" must be a number, got nan'),
    "size": (table(entry(size=0)), '"size" must be a number of pixels or null, got 0'),
    "no source": (table(entry(sources=[])), '"sources" must name at least one source'),
    "lost source": (table(entry(sources=["there"])), "there is no source 'there'; there are here"),
    "extra": (table(entry(unit="%")), "entry 1 has an unknown 'unit'"),
    "twice": (table(entry(), entry(value=1)), "entry 2 says again what entry 1 says: Mine, PCK@0.1"),
    "dataset": (table(entry(dataset=3)), '"dataset" must be a line of text'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_of_published_numbers_are_refused(case, tmp_path):
    content, message = BROKEN[case]
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"numbers\.json: .*{re.escape(message)}.*docs/evaluation_report\.md"):
        load_published(tmp_path / "numbers.json")


def test_files_of_published_numbers_that_are_no_json(tmp_path):
    (tmp_path / "numbers.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
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


def test_latex_prints_every_name_literally(saved, tmp_path):
    save_json(tmp_path / "r.json", spair())
    odd = r"a_b & 50% of #1 ~{x}^\y|z$"
    text = report.build([read_run(tmp_path / "r.json", odd)], load_published()).latex()
    escaped = r"a\_b \& 50\% of \#1 \textasciitilde{}\{x\}\textasciicircum{}\textbackslash{}y|z\$"
    assert f"{escaped}: lift & " in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {4}
    assert not re.search(r"(?<!\\)[%$#_]", "\n".join(line for line in text.splitlines() if not line.startswith("% ")))
    assert r"\textbf{" in text
    assert r"a\_b |" not in report.build([read_run(tmp_path / "r.json", odd)]).markdown()


def pixels(chart):
    assert isinstance(chart, Image.Image)
    return np.asarray(chart)


def test_charts(saved):
    runs = [saved("mine", spair()), saved("k", costs())]
    plain, with_published = report.build(runs[:1]), report.build(runs[:1], load_published())
    first = pixels(report.draw(plain))
    assert not np.array_equal(first, pixels(report.draw(plain, "PCK@0.05")))
    # Published lines need rows of their own in the legend.
    assert pixels(report.draw(with_published)).shape[0] > first.shape[0]
    both = report.build(runs, metrics=["PCK@0.1"])
    assert not np.array_equal(pixels(report.draw(both, "PCK@0.1", "cost")), first)


def test_long_names_find_room_in_a_legend():
    short, long = (
        pixels(line_chart([Series(name * 60, [(1, 2), (3, 4)]) for name in names], title="", x="", y=""))
        for names in (("", "", ""), ("m", "n", "o"))
    )
    assert long.shape[0] > short.shape[0]
    # Three rows of the legend, each with ink of its own.
    dark = (long[short.shape[0] - 40 :] < 100).all(-1).any(1)
    assert np.count_nonzero(np.diff(dark.astype(int)) == 1) >= 3


def test_charts_that_cannot_be_drawn(saved):
    one = report.build([saved("mine", spair())])
    two = report.build([saved("mine", spair()), saved("w", warp())])
    single = report.build([saved("d", davis())])
    for found, metric, against, message in (
        (one, "AP", "size", "no run has a AP at 2 or more sizes"),
        (single, None, "size", "no run has a metric at 2 or more sizes"),
        (two, "PCK@0.1", "size", "several fit: SPair-71k, test, Matching under known warps"),
        (one, "PCK@0.1", "cost", "needs a result of lift-fast eval cost"),
        (one, None, "time", "against must be 'size' or 'cost', got 'time'"),
    ):
        with pytest.raises(ValueError, match=message):
            report.draw(found, metric, against)
    other = report.build([saved("mine", spair()), saved("k", costs(model="dino_vitb16"))])
    with pytest.raises(ValueError, match="hold none of the runs' backbones, methods and sizes"):
        report.draw(other, "PCK@0.1", "cost")
    changed = costs()
    changed["costs"][0]["gflops"] = 99.0
    clash = report.build([saved("mine", spair()), saved("k", costs()), saved("l", changed)])
    with pytest.raises(ValueError, match="two runs give different costs of backbone on dino_vits16 at 112 pixels"):
        report.draw(clash, "PCK@0.1", "cost")


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.usefixtures("one_thread")
def test_command_from_evaluation_to_report(tmp_path, capsys):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 64), Image.Resampling.BICUBIC).save(photographs / f"{seed}.png")
    tiny = ["--model", "vit_tiny_patch16_224", "--random-weights", "--layer", "0", "--quiet", "--json"]
    warps = ["eval", "warp", "--root", photographs, "--sizes", "32", "64", "--points", "9", "--method", "backbone"]
    first, second, spent = (tmp_path / f"{name}.json" for name in ("first", "second", "cost"))
    assert run(*warps, "bilinear", *tiny, "--out", first) == 0
    assert run(*warps, *tiny, "--seed", "1", "--limit", "1", "--out", second) == 0
    assert run("eval", "cost", "--sizes", "32", "64", "--method", "backbone", *tiny, "--out", spent) == 0
    capsys.readouterr()

    outputs = {name: tmp_path / name for name in ("report.json", "report.tex", "chart.png")}
    files = [f"old={first}", second, spent]
    options = ["--out", outputs["report.json"], "--latex", outputs["report.tex"], "--chart", outputs["chart.png"]]
    assert run("eval", "report", *files, *options, "--metrics", "PCK@0.1", "GFLOPs", "--against", "cost") == 0
    text = capsys.readouterr().out
    measured = json.loads(first.read_text())["summary"]["sizes"]["32"]["bilinear"]["PCK@0.1"]
    assert re.search(rf"\| old: bilinear \| (\*\*)?{measured[0]:.2f}(\*\*)? \[{measured[1]:.2f}, ", text)
    assert "UNLIKE RUNS" in text
    assert "seed: 0 (old), 1 (second)" in text
    assert "published" not in text.replace("GFLOPs as published", "")
    with Image.open(outputs["chart.png"]) as chart:
        assert chart.format == "PNG"
    assert r"\begin{tabular}{l" in outputs["report.tex"].read_text()
    content = json.loads(outputs["report.json"].read_text())
    assert [group["protocol"] for group in content["groups"]] == ["warp", "cost"]
    assert content["groups"][0]["unlike"] is True
    assert content["files"]["old"] == str(first)

    assert run("eval", "report", *files, "--json") == 0
    assert json.loads(capsys.readouterr().out)["groups"][1]["columns"][0] == {"metric": "parameters, M", "size": 32}


def test_command_takes_published_numbers_of_ones_own(tmp_path, capsys):
    save_json(tmp_path / "r=1.json", spair())
    (tmp_path / "numbers.json").write_text(json.dumps(table(entry())))
    assert run("eval", "report", tmp_path / "r=1.json", "--published", tmp_path / "numbers.json") == 0
    text = capsys.readouterr().out
    assert "| published: Mine [1] | 33.30 |  |" in text
    assert "r=1: backbone" in text
    assert "[1] A paper, Table 7; read from its PDF" in text
    assert "DINO S/16" not in text
    assert run("eval", "report", tmp_path / "r=1.json", "--published", "none") == 0
    assert "published" not in capsys.readouterr().out
    assert run("eval", "report", tmp_path / "r=1.json") == 0
    assert "published: DINO S/16 + LiFT" in capsys.readouterr().out


USAGE = {
    "gone": (["gone.json"], "gone.json"),
    "name": (["={}"], "expected a file or NAME=FILE"),
    "published": (["{}", "--published", "gone.json"], "gone.json"),
    "metric": (["{}", "--metrics", "AP"], "no run has the metric 'AP'"),
    "twice": (["{}", "b={}"], "is given twice"),
    "out": (["{}", "--out", "nowhere/x.json"], "the folder nowhere does not exist"),
    "latex": (["{}", "--latex", "nowhere/x.tex"], "the folder nowhere does not exist"),
    "chart": (["{}", "--chart", "nowhere/x.png"], "the folder nowhere does not exist"),
    "cost": (["{}", "--chart", "x.png", "--against", "cost"], "needs a result of lift-fast eval cost"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_json(tmp_path / "run.json", spair())
    arguments, message = USAGE[case]
    assert run("eval", "report", *(argument.format(tmp_path / "run.json") for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "x.png").exists()


def test_the_shipped_file_is_beside_the_module():
    assert SHIPPED.is_file()
    assert SHIPPED.parent.name == "evaluation"
