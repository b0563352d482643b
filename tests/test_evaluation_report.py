"""Reports: every protocol's results read back, unlike runs told apart, published numbers, what is refused."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from evaluation_data import (
    MAKERS,
    METHODS,
    cka_result,
    cost_result,
    davis_result,
    discovery_result,
    number,
    numbers,
    record,
    spair_result,
    warp_result,
)
from PIL import Image

from lift_fast.cli import main
from lift_fast.evaluation import report
from lift_fast.evaluation.charts import Series, line_chart
from lift_fast.evaluation.discovery.dataset import COCO_LIST, read_coco, read_voc
from lift_fast.evaluation.published import load_published
from lift_fast.evaluation.results import Estimate, save_json
from lift_fast.evaluation.runs import read_run


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
    content = warp_result(5)
    group = one_group(saved("one", content))
    for size in (112, 224):
        for method in METHODS:
            for metric in ("PCK@0.1", "PCK@0.05", "median"):
                expected = content["summary"]["sizes"][str(size)][method][metric]
                assert value(group, "one", method, metric, size).as_list() == pytest.approx(expected)
    order = [("PCK@0.1", 112), ("PCK@0.1", 224), ("PCK@0.05", 112), ("PCK@0.05", 224), ("median", 112), ("median", 224)]
    assert list(group.columns) == order


def test_davis_discovery_cka_and_cost_figures(saved):
    content = davis_result()
    group = one_group(saved("d", content))
    assert value(group, "d", "lift", "J&F-Mean", 224) == pytest.approx(content["summary"]["lift"]["J&F-Mean"])
    assert [name for name, _ in group.columns] == ["J&F-Mean", "J-Mean", "F-Mean"]
    group = one_group(saved("f", discovery_result(None, "voc07")))
    assert value(group, "f", "backbone", "CorLoc", None) == 0
    assert value(group, "f", "backbone", "mean IoU", None) == pytest.approx(0.4)
    assert group.title == "Object discovery, voc07"
    group = one_group(saved("c", cka_result()))
    assert value(group, "c", "backbone", "CKA", 112) == Estimate(0.612, 0.4, 0.9)
    assert value(group, "c", "lift", "CKA", 112) is None
    group = one_group(saved("k", cost_result(3.5)))
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
    runs = [saved("d", davis_result()), saved("w", warp_result())]
    found = report.build(runs, metrics=["J-Decay", "J-Mean"])
    assert [group.columns for group in found.groups] == [(("J-Decay", 224), ("J-Mean", 224))]
    group = one_group(saved("s", spair_result(20)), metrics=["PCK@0.1 per image", "PCK@0.1"])
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
    one, two = saved("one", spair_result(20)), saved("two", spair_result(25, seed=1))
    found = report.build([one, two])
    assert not found.groups[0].unlike
    assert bold(found) == [["two: lift"]] * 4


def test_all_pairs_are_called_all(saved):
    runs = []
    for name, count in (("whole", None), ("drawn", 100)):
        content = spair_result(20)
        content["options"]["pairs_per_category"] = count
        runs.append(saved(name, content))
    assert "pairs_per_category: all (whole), 100 (drawn)" in report.build(runs).markdown()


def test_unlike_runs_are_told_apart(saved):
    one, two = saved("one", warp_result(1)), saved("two", warp_result(2, names=("x.png", "q.png")))
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
    runs = [saved("one", warp_result(1, names=names)), saved("two", warp_result(2, names=[*names[3:], "q.png"]))]
    other = warp_result(3, names=names)
    del other["options"]["photographs"]
    assert "photographs: 9 (one), 7 (two), 6 of them in all" in report.build(runs).markdown()
    text = report.build([*runs, saved("three", other)]).markdown()
    assert "photographs: 9 (one), 7 (two), not recorded (three), 6 of them in all" in text


UNLIKE = {
    "points": (warp_result(), lambda c: c["options"].update(points=50)),
    "davis": (davis_result(), lambda c: c["options"].update(topk=9)),
    "tau": (discovery_result(), lambda c: c["options"].update(tau=0.2)),
    "lattice": (cka_result(), lambda c: c.update(grid=14)),
    "photographs": (cka_result(), lambda c: c.update(options={"photographs": list("wxyz")})),
    "milliseconds": (cost_result(1.0), lambda c: c["record"].update(cpu="another")),
    "pairs": (spair_result(), lambda c: c["summary"].update(pairs={"cat": 17})),
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
    content = warp_result()
    changed = copy.deepcopy(content)
    LIKE[case](changed)
    assert not one_group(saved("one", content), saved("two", changed)).unlike


def test_data_sets_never_share_a_table(saved):
    found = report.build([saved("a", discovery_result()), saved("b", discovery_result(dataset="voc12"))])
    assert [group.dataset for group in found.groups] == ["coco20k", "voc12"]


def test_differences_in_networks_and_versions_are_listed(saved):
    other = record(seed=3, versions={"torch": "2.11.0", "lift_fast": "0.1.0"}, random_weights=True)
    other["weights"] = {"lift": {"file": "m:f", "sha256": None}}
    runs = [saved("one", spair_result()), saved("two", spair_result(**other))]
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


def test_masks_of_unknown_origin_and_skipped_images_are_said(saved):
    text = report.build([saved("masks", davis_result(None)), saved("found", discovery_result())]).markdown()
    assert "masks: masks or figures without a record of the networks behind them, sequences: 1, objects: 2" in text
    assert "found: dino_vits16, images: 8, 1 skipped" in text


def test_copies_are_recognised(saved):
    later = spair_result()
    later["record"]["date"] = "another day"
    assert (
        "copy and first hold the same result"
        in report.build([saved("first", spair_result()), saved("copy", later)]).markdown()
    )


def test_runs_of_one_name_or_file_are_refused(saved, tmp_path):
    run = saved("one", warp_result())
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


def at_112(entry):
    return lambda content: content["summary"]["sizes"]["112"]["lift"].update(entry)


MALFORMED = {
    "unknown protocol": (
        warp_result,
        lambda c: c.update(protocol="ap"),
        "results of 'ap'; expected results of one of warp, spair",
    ),
    "no text": (warp_result, lambda c: c.update(protocol=["warp"]), "expected results of one of"),
    "report": (warp_result, lambda c: c.update(protocol="report"), "expected results of one of"),
    "interrupted": (
        warp_result,
        lambda c: (c.update(complete=False), c.pop("summary")),
        "holds an interrupted run; give its command again",
    ),
    "no summary": (spair_result, without(["summary"]), "is not a valid .* results file .KeyError: 'summary'"),
    "summary": (spair_result, lambda c: c.update(summary=3), "is not a valid .* results file"),
    "sizes": (spair_result, lambda c: c["summary"].update(sizes=[1]), "is not a valid .* results file"),
    "size": (
        spair_result,
        lambda c: c["summary"]["sizes"].update(big={"lift": {"PCK@0.1": 3}}),
        "is not a valid .* results file",
    ),
    "truth": (
        spair_result,
        lambda c: c["summary"]["sizes"]["112"]["lift"].update({"PCK@0.1": True}),
        "expected a number",
    ),
    "pair": (
        spair_result,
        lambda c: c["summary"]["sizes"]["112"]["lift"].update({"PCK@0.1": [1, 2]}),
        "is not a valid .* results file",
    ),
    "nothing": (spair_result, lambda c: c["summary"].update(sizes={}), "holds no figures"),
    "davis": (davis_result, without(["options", "subset"]), "is not a valid .* results file"),
    "davis text": (davis_result, lambda c: c["summary"]["lift"].update({"J-Mean": "7"}), "expected a number, got '7'"),
    "discovery": (discovery_result, without(["summary", "lift", "corloc"]), "is not a valid .* results file"),
    "cka": (cka_result, without(["curves"]), "is not a valid .* results file"),
    "huge": (
        davis_result,
        lambda c: c["summary"]["lift"].update({"J-Mean": 10**400}),
        "is not a valid .* results file",
    ),
    "model": (warp_result, lambda c: c["record"].update(model=["x"]), "expected the name of a model"),
    "cost": (cost_result, lambda c: c["costs"].append({}), "is not a valid .* results file"),
    "record": (warp_result, lambda c: c.update(record=[1]), "is not a valid .* results file"),
    "weights": (warp_result, lambda c: c["record"].update(weights={"lift": "x"}), "is not a valid .* results file"),
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
    content = discovery_result()
    content["summary"]["lift"]["corloc"] = float("nan")
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a number, got nan"):
        read_run(tmp_path / "odd.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', "\x00"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json (is not a JSON file|is not a file of results)"):
        read_run(tmp_path / "odd.json")
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "gone.json")


def test_published_numbers_stand_in_matching_columns_alone(saved):
    found = report.build([saved("mine", spair_result(50))], load_published())
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
    assert "published" not in report.build([saved("again", spair_result(50))]).markdown()


def test_published_rows_are_never_bold_even_if_better(saved):
    found = report.build([saved("mine", spair_result(1))], load_published())
    assert bold(found)[:2] == [["mine: lift"]] * 2


def test_published_numbers_of_other_protocols(saved):
    runs = [
        saved(name, content)
        for name, content in (
            ("d", davis_result()),
            ("f", discovery_result()),
            ("k", cost_result()),
            ("w", warp_result()),
        )
    ]
    groups = {group.protocol: group for group in report.build(runs, load_published()).groups}
    rows = {p: {row.label: row.cells for row in g.rows if row.run is None} for p, g in groups.items()}
    assert rows["davis"]["DINO S/16 + LiFT"] == {("J&F-Mean", 224): 44.3}
    assert rows["discovery"]["DINO S/16 + LiFT"] == {("CorLoc", 224): 58.03}
    assert rows["cost"]["DINO S/16 + LiFT"] == {("GFLOPs as published", 224): 5.30, ("parameters, M", 224): 22.2}
    assert rows["warp"] == {}
    # Another size or data set has no published number here.
    year = davis_result()
    year["options"]["year"] = "2016"
    for other in (year, davis_result(480), discovery_result(None), discovery_result(dataset="voc07")):
        (group,) = report.build([saved("o", other)], load_published()).groups
        assert all(row.run is not None for row in group.rows)


def test_data_sets_are_known_by_what_published_numbers_call_them(tmp_path, saved):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text('{"images": [], "annotations": []}')
    names = tmp_path / COCO_LIST
    names.write_text("COCO_train2014_000000000009.jpg\n")
    (tmp_path / "mine.txt").write_text(names.read_text())
    run = saved("o", discovery_result(dataset=read_coco(tmp_path).name))
    assert run.dataset == "coco20k"
    (group,) = report.build([run], load_published()).groups
    assert any(row.label == "DINO S/16 + LiFT" for row in group.rows)
    # A list of one's own is another data set.
    assert (
        saved("o", discovery_result(dataset=read_coco(tmp_path, names=tmp_path / "mine.txt").name)).dataset
        == "COCO mine"
    )
    for year in (2007, 2012):
        base = tmp_path / f"VOC{year}" / "ImageSets" / "Main"
        base.mkdir(parents=True)
        (base / "trainval.txt").write_text("000001\n")
        for no_hard in (False, True):
            name = saved("o", discovery_result(dataset=read_voc(tmp_path, year, no_hard=no_hard).name)).dataset
            assert (name == f"voc{year % 100:02}") is not no_hard


def test_images_without_a_determined_cut_are_counted(saved):
    content = discovery_result()
    content["summary"]["lift"]["degenerate"] = 7
    group = one_group(saved("a", content))
    assert value(group, "a", "lift", "not determined", 224) == 7
    assert value(group, "a", "backbone", "not determined", 224) == 0


def test_other_backbones_are_said_to_be_others(saved):
    found = report.build([saved("mine", spair_result(model="demo_vitt16"))], load_published())
    assert "The published rows are of other backbones than the runs'" in found.markdown()
    assert found.groups[0].left_out == 0


def test_latex_prints_every_name_literally(saved, tmp_path):
    save_json(tmp_path / "r.json", spair_result())
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
    runs = [saved("mine", spair_result()), saved("k", cost_result())]
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
    one = report.build([saved("mine", spair_result())])
    two = report.build([saved("mine", spair_result()), saved("w", warp_result())])
    single = report.build([saved("d", davis_result())])
    for found, metric, against, message in (
        (one, "AP", "size", "no run has a AP at 2 or more sizes"),
        (single, None, "size", "no run has a metric at 2 or more sizes"),
        (two, "PCK@0.1", "size", "several fit: SPair-71k, test, Matching under known warps"),
        (one, "PCK@0.1", "cost", "needs a result of lift-fast eval cost"),
        (one, None, "time", "against must be 'size' or 'cost', got 'time'"),
    ):
        with pytest.raises(ValueError, match=message):
            report.draw(found, metric, against)
    other = report.build([saved("mine", spair_result()), saved("k", cost_result(model="dino_vitb16"))])
    with pytest.raises(ValueError, match="hold no backbone, method and size of the runs"):
        report.draw(other, "PCK@0.1", "cost")
    changed = cost_result()
    changed["costs"][0]["gflops"] = 99.0
    clash = report.build([saved("mine", spair_result()), saved("k", cost_result()), saved("l", changed)])
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
    save_json(tmp_path / "r=1.json", spair_result())
    (tmp_path / "numbers.json").write_text(json.dumps(numbers(number())))
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
    save_json(tmp_path / "run.json", spair_result())
    arguments, message = USAGE[case]
    assert run("eval", "report", *(argument.format(tmp_path / "run.json") for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "x.png").exists()
