"""Unfinished runs: files that the release before wrote are resumed, settings that differ are named."""

from __future__ import annotations

import base64
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_data import OPTIONS, make_spair, network_of, patch_features, save_mask, write_davis
from PIL import Image

from lift_fast.evaluation import cka, discovery, spair, warp
from lift_fast.evaluation.davis import Davis, Job, predict_dataset
from lift_fast.evaluation.methods import Features, Method
from lift_fast.evaluation.resume import Journal, Lines, check_same, differing, new_result

pytestmark = pytest.mark.usefixtures("one_thread")

RECORD = {"model": "m", "layer": None, "date": "then"}
# What the release before had written when it was interrupted after its first image, pair or sequence.
WARP = """{"protocol": "warp", "complete": false, "options": {"methods": ["patches"], "sizes": [32], "seeds": 1,
"points": 4, "alphas": [0.25], "photometric": true, "reference": null, "photographs": ["a.png", "b.png"]}, "record":
{"model": "m", "layer": null, "date": "then"}, "scores": {"0": {"32": {"patches": {"a.png": [0.25, 16.438410509196068,
13.259383335418509]}}}}, "skipped": {}}
"""
SPAIR = """{"protocol": "spair", "complete": false, "options": {"methods": ["patches"], "split": "test", "layout":
"large", "categories": ["cat", "dog"], "sizes": [32], "seeds": 1, "pairs_per_category": null, "draw": "distinct",
"viewpoint_variation": null, "scale_variation": null, "truncation": null, "occlusion": null, "alphas": [0.3],
"placement": "stretch"}, "record": {"model": "m", "layer": null, "date": "then"}, "scores": {"32": {"patches": {"cat":
{"000001-2008_000004-2008_000001:cat": [3, 0, 0]}}}}, "draws": null, "skipped": {}, "left_out": {}, "remarks": {}}
"""
DISCOVERY = (
    '{"settings": {"dataset": "mine", "eps": 1e-05, "layer": null, "method": "patches", "model": "m", "resolution": '
    'null, "rule": "published", "tau": 0.2}}\n'
    '{"name": "a", "box": [0.0, 0.0, 32.0, 32.0], "iou": 0.3333333333333333, "found": false, "degenerate": false}\n'
    '{"name": "b", "box": [0.0, 0.0'
)
DAVIS = """{
 "method": "patches",
 "layer": null,
 "sizes": [
  1,
  2
 ]
}
"""
# OUT.partial.pt, compressed.
CKA = (
    b"c-pO3e{2&~9KWqww-p9B6b8&OifDnYTYufw0Un;SVrs&uiWOMut$pnsyY~9-UWb625VHXbF<FAqgakF1K%yp^NQ7t{><?n53`J4HFHr(<8bpnM"
    b"NJ!B4?n><)Y;AFuT;BV>em_6n{rG;b?S4}UMU|IRw;lBqP1(a;oIT0ONZ>?!S7M_eK!?{Z3Q-h_atdld@nmC!LpY~P^s!EAUBSn;;vPuZg4hFv"
    b"zzYZ#1xN98t2HT0ND51$wYAQQO<3#etWpvQQbNHiTdi?`cqu~W>#a!+g?XS@J8+I7Yys-3%Sl2RM1c$vVStxtH(rRzLIlrUc$(y~LQLk8yhejJ"
    b"k%$qUPIc1JqvFGo9MKe|2vFU`Nsh>E1~QHkDN)2Bz6M0Xig=K)5}?v0B$Gfz_VmDFb$_z7Nr9#wSQ0G7ktzpEJD~Y-=HiAg_~%yGI7Q7<QgH>A"
    b"b-?l-SYcCh!%`}Npv7MiG~-B;g_w|lQ##;OTNp`ln74;gNDviENCurLL5zeDNGOsV>ULUSrOg&BBdj=+ivc)IgIL<6RHq1@(pD{Sdawv5HNhD{"
    b"6A?_N;5~j5f>mq$l;6|`XZnl!;Jv%T_>PDmtlkI9YB_>0Zlp~JBMZE5aRAOjaCQJz^H`Ff#%qiYIEPo6=BAnE5vH15JOSK~U~K@-2Rz<wolS>x"
    b"!UY=6n#L_8xCb=cA_N}{z=w1I7qn@B#c9A20$8d6>Je-RKsyMM=Nvy;kyIEdu(1O+=~dm(fk`S5bgCqNQ$KX!p{O6aH6jm!bO1K%KpxnlfxH<|"
    b"s|H%8ftDk<A^;!OfoRBRpp_ZWBN~X+K#wBW7J!d|6qmBM`^(D5q92@FgzpVG+sA!rT~upcFReW)$#D*ax`C|Vo9SceyLflW;UL~Vx_0hmvMF+o"
    b"?~SJB<>xK^sD?OEh$Z46fqd-j@$AuVVu0BM$BMB;@q`8%sD*hM=-iBeL>_J*J3rTD5e0-qKs@xVxHN~np5_TXETOD<SJlQQA6uKl0H&;7c4Tx2"
    b"j|bV|vkV^pdU5M_L&VYU9fQwSlY|_OX5{b4;bW)j9LZh1zi&7{GBo`4dpCx@JkMO`2G^b#J+12hGk2|TlJ%WNeQKP8=+})L+ds+rt~=|$`-wJw"
    b"m>%C>PW0Ow_Z*&NeYa76<jL(-pIQE3zB#n7=E#AwO#ip*Ug=%^YbJivCid;A`J7qz8#+2N{Y>Wf4e9vU<((U!=)TDizbCivs9c2|t;*rIE`Prs"
    b"A6qlw6Wlxaajm2GPv)lCJ22(yMP}tr+dI`4_h#a@(9^rw)7P2AHmdpR!84iP#dQ4X@X?>fo}amr_+Jo6^-i*XI+y=}_G_)b{C$NvzVqCvZ3jmg"
    b"=)19h(Mv~|ORsHu<I3tEnACP~$~$|QVcr%`vg`$B?{M@$wBj;z;k-+T44h_8%<Vot_G7W?|KwYH<GKAWrRL}5KU3Q0O|$`*g(!cuFZN9C`q@g&"
    b"%CCT{mremP&Jnh7<ZB@$M0{-39gH;5Enbh)>!IDvEgokR?eR3XG|_GcUZ$N6M>7svnq5vWad~vc!dGqBhfQ@^M9gM<X1B-s+ng8j9cyIHZf-6e"
    b">md_$H_g^4klnm!oxqwB>MlE`Q6sxKHRv=><*AWribm?}F0({Oy|$Dppw}6Bv%80$_vb=*9Y)^luAt}T%?0o}jl9{_-r%<oUYC(KyDA&}mKDJ3"
    b"Hu7dyOFeIOc>%nh+x%u#F+K11h49iw-s~E+RLA>z1yx8zG!kc*l~x^bm4*5r1+U$2Hs2~mwWj~xx=O>izeF1kTW)>2n8_bDYW;LA*1oDs%^Ids"
    b"&DV1O1$$l;tp"
)


class Patches:
    """Mean colours of patches, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        maps = F.avg_pool2d(batch.imgs, 16)
        return Features(maps, (0, 0, 16 * maps.shape[2], 16 * maps.shape[3]))


BACKBONE = SimpleNamespace(patch_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu", dtype=torch.float32)


@pytest.fixture
def photographs(tmp_path):
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_warp_resumes_a_file_of_the_release_before(tmp_path, photographs):
    out, patches = tmp_path / "warp.json", Patches()
    out.write_text(WARP)

    def run(points=4):
        options = {"sizes": (32,), "protocol": warp.WarpProtocol(points, (0.25,)), "record": {**RECORD, "date": "now"}}
        return warp.evaluate([Method("patches", patches)], BACKBONE, photographs, tmp_path, out=out, **options)

    with pytest.raises(ValueError, match=r"warp\.json was made with other settings \(points\); give another file"):
        run(points=5)
    content = run()
    assert patches.calls == 2
    scores = content["scores"]["0"]["32"]["patches"]
    assert scores["a.png"] == json.loads(WARP)["scores"]["0"]["32"]["patches"]["a.png"]
    assert list(scores) == ["a.png", "b.png"]
    assert content["summary"]["photographs"] == 2
    assert json.loads(out.read_text()) == json.loads(json.dumps(content))


def test_spair_resumes_a_file_of_the_release_before(tmp_path):
    dataset = spair.SPair(make_spair(tmp_path / "SPair-71k", categories=("cat", "dog"), pairs=1))
    out, patches = tmp_path / "spair.json", Patches()
    out.write_text(SPAIR)

    def run(placement="stretch"):
        options = {"sizes": (32,), "protocol": spair.Protocol((0.3,), placement), "record": {**RECORD, "date": "now"}}
        methods = [Method("patches", patches)]
        return spair.evaluate(methods, BACKBONE, dataset, dataset.select(), out=out, **options)

    with pytest.raises(ValueError, match=r"spair\.json was made with other settings \(placement\); give another file"):
        run("cover")
    content = run()
    # The images of the other category's pair, in one batch.
    assert patches.calls == 1
    scores = content["scores"]["32"]["patches"]
    assert scores["cat"] == json.loads(SPAIR)["scores"]["32"]["patches"]["cat"]
    assert content["summary"]["pairs"] == {"cat": 1, "dog": 1}


def test_cka_resumes_a_file_of_the_release_before(tmp_path, photographs):
    out, partial, patches = tmp_path / "cka.json", tmp_path / "cka.partial.pt", Patches()
    partial.write_bytes(zlib.decompress(base64.b85decode(CKA)))

    def run(out=out, grid=3):
        normalisation = {"mean": BACKBONE.mean, "std": BACKBONE.std}
        options = {"sizes": (32,), "reference": 64, "grid": grid, "root": tmp_path, "record": RECORD, **normalisation}
        return cka.scale_invariance([("patches", patches)], photographs, out=out, **options)

    with pytest.raises(ValueError, match=r"partial\.pt was made with other settings \(grid\); give another file"):
        run(grid=4)
    content = run()
    assert patches.calls == 2
    assert not partial.exists()
    entry, whole = (found["curves"]["patches"]["32"] for found in (content, run(None)))
    assert entry["cka"] == pytest.approx(whole["cka"], rel=1e-6)
    assert entry["pooled"] == pytest.approx(whole["pooled"], rel=1e-6)


def test_discovery_resumes_a_file_of_the_release_before(tmp_path, photographs):
    samples = [discovery.Sample(path.stem, path, ((8.0, 8.0, 40.0, 48.0),)) for path in photographs]
    journal, patches = tmp_path / "voc.patches.jsonl", Patches()
    journal.write_text(DISCOVERY)

    def run(tau=0.2):
        options = {"tau": tau, "out": tmp_path / "voc.json", "record": {**RECORD, "date": "now"}}
        return discovery.evaluate([("patches", patches)], BACKBONE, discovery.BoxDataSet("mine", samples), **options)

    with pytest.raises(ValueError, match=r"patches\.jsonl was made with other settings \(tau\); give another file"):
        run(tau=0.3)
    content = run()
    assert patches.calls == 1
    first, second = content["predictions"]["patches"]
    assert first["box"] == (0, 0, 32, 32)
    assert second["name"] == "b"
    # What was cut off is gone, all else stands.
    assert journal.read_text().splitlines()[:2] == DISCOVERY.splitlines()[:2]
    assert json.loads(journal.read_text().splitlines()[2])["name"] == "b"


def test_davis_resumes_masks_of_the_release_before(tmp_path):
    dataset, folder = Davis(write_davis(tmp_path / "davis")), tmp_path / "masks"
    (folder / "shape-0").mkdir(parents=True)
    (folder / "predictions.json").write_text(DAVIS)
    frames = dataset.sequence("shape-0").frames
    for frame in frames:
        save_mask(folder / "shape-0" / f"{frame.stem}.png", np.full((60, 96), 7, np.uint8))
    network = network_of(patch_features(0))
    job = Job("patches", network.methods[0], folder, {"method": "patches", "layer": None, "sizes": (1, 2)})
    done = predict_dataset(dataset, [job], network, OPTIONS)
    assert done.kept == [("shape-0", "patches")]
    assert done.computed == [("shape-1", "patches")]
    assert (folder / "predictions.json").read_text() == DAVIS
    assert np.asarray(Image.open(folder / "shape-0" / f"{frames[3].stem}.png")).min() == 7


@pytest.mark.parametrize("change", [{"options": None}, {"record": 3}, {"scores": [1]}])
def test_results_of_another_form_are_not_resumed(change):
    now = {"protocol": "x", "options": {"a": 1}, "record": {}, "scores": {}}
    check_same("r.json", now, now)
    with pytest.raises(ValueError, match=rf"r\.json cannot be resumed: it holds no valid {next(iter(change))}"):
        check_same("r.json", {**now, **change}, now)
    with pytest.raises(ValueError, match=r"made with other settings \(a\);"):
        check_same("r.json", {**now, "options": {"a": 2}}, now)


def test_settings_that_differ_are_named():
    # A setting that the release before did not know was None there.
    assert differing({"a": 1}, {"a": 1, "b": None}) == []
    assert differing({"a": 1, "c": None}, {"a": 2, "b": 0}) == ["a", "b", "c"]


def test_a_journal_is_written_when_its_time_has_come(tmp_path):
    def journal(seconds):
        return Journal(tmp_path / "r.json", new_result("x", {"a": 1}, None), seconds)

    later = journal(1e9)
    later.part(0, 32)["name"] = 1
    later.save()
    assert not (tmp_path / "r.json").exists()
    now = journal(0)
    now.part(0, 32)["name"] = 2
    now.save()
    assert journal(0).before == {**new_result("x", {"a": 1}, {}), "scores": {"0": {"32": {"name": 2}}}}
    assert later.finish(complete=True)["complete"]
    assert journal(0).before["scores"] == {"0": {"32": {"name": 1}}}
    with pytest.raises(FileNotFoundError, match=r"cannot write .*: the folder .* does not exist"):
        Journal(tmp_path / "gone" / "r.json", new_result("x", {}, None))


def test_lines_without_a_file_are_kept_in_memory():
    lines = Lines(None, {}, int, str)
    lines.add("a", 3)
    assert lines.done == {"a": 3}
