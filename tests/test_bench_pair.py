"""What the benchmarks compare with computes the same, by other ways."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast import ViTLiFTExtractor, load_backbone
from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.testing import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import folder, keys, pair, wide
from bench.alternate import Paired
from bench.gpu.cost import keys_flops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("model", "size"), [("dino_vits16", (64, 96)), ("dino_vits8", (40, 24))])
def test_keys(model, size):
    backbone = load_backbone(model, random_weights=True)
    imgs = torch.randn(2, 3, *size)
    network = keys.Keys(backbone.model, size)
    with torch.inference_mode():
        assert relative_error(keys.plain(network, imgs)(imgs), backbone(imgs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_keys_by_other_engines(name):
    pytest.importorskip(name)
    backbone = load_backbone("dino_vits16", random_weights=True)
    imgs = torch.randn(1, 3, 48, 32)
    run = getattr(keys, name)(keys.Keys(backbone.model, (48, 32)), imgs)
    with torch.inference_mode():
        assert relative_error(run(imgs), backbone(imgs)) < 1e-5
        assert relative_error(run(imgs + 1), backbone(imgs + 1)) < 1e-5


def test_operations_of_the_keys():
    from lift_fast.evaluation.cost import flop_counter

    network = keys.Keys(load_backbone("dino_vits16", random_weights=True).model, (32, 48))
    with flop_counter() as counter, torch.inference_mode():
        network(torch.randn(1, 3, 32, 48))
    assert keys_flops(6, 384, 12, 16) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_wide_networks_have_the_demonstrations_features():
    # The demonstration's rule for position embeddings is another one.
    backbone = load_backbone(BACKBONE, position_rule="dino", head_order="interleaved")
    narrow = ViTLiFTExtractor(
        model=backbone, lift_path=LIFT, channel=None, patch=None, stride=None, layer=None, device="cpu"
    )
    large = wide.vit_s(torch.float32)
    assert (large.channel, large.backbone.depth, large.lift.in_channels) == (384, 12, 384)
    imgs = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        rows = [torch.nn.functional.normalize(extractor(imgs)[0], dim=-1) for extractor in (narrow, large)]
    torch.testing.assert_close(rows[0] @ rows[0].T, rows[1] @ rows[1].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2500, 1031), (1024, 3)])
def test_mutual_nearest(n, m):
    query, key = torch.randn(n, 7, dtype=torch.float64), torch.randn(m, 7, dtype=torch.float64)
    products = query @ key.T
    similarity, index, mutual = pair.mutual_nearest(query, key)
    assert torch.equal(index, products.argmax(1))
    torch.testing.assert_close(similarity, products.max(1).values)
    assert torch.equal(mutual, products.argmax(0)[index] == torch.arange(n))


def test_ours_and_the_usual_parts_agree():
    size = 224
    extractor, images = wide.vit_s(torch.float32), pair.photographs(size)
    matches = pair.ours(extractor)(*images)
    found = pair.UsualParts(extractor, "plain PyTorch", size)(*images)
    assert set(found.seconds) == set(matches.seconds) == set(pair.STAGES)
    assert found.at.shape == (pair.POINTS**2, 2)
    assert -1 < pair.disagreement(matches, found) < 1e-4
    # Ours has four times as many pixels to choose from, but mostly beside those.
    own = matches.similarity[found.at[:, 1], found.at[:, 0]]
    assert float((own - found.similarity).mean()) < 0.02


def test_pairs_of_times():
    found = Paired([1.0, 2.0, 1.0, 4.0, 1.0], [2.0, 4.0, 3.0, 4.0, 2.0])
    assert found.speedup == 2
    assert found.quartiles == (1.5, 2.5)


def test_a_folder_by_the_command_and_by_a_loop(tmp_path):
    extractor = ViTLiFTExtractor(BACKBONE, LIFT, device="cpu", silent=True)
    paths = folder.photographs(tmp_path / "in", 3, longer=160)
    assert [Image.open(path).size for path in paths] == [(120, 160), (160, 120), (120, 160)]
    folder.by_command(tmp_path / "in", tmp_path / "ours", extractor, 64)
    folder.by_loop(paths, tmp_path / "plain", extractor, 64)
    assert folder.difference(tmp_path / "ours", tmp_path / "plain") < 1e-5
    with np.load(tmp_path / "plain/1.npz") as data:
        np.savez(tmp_path / "plain/1.npz", descriptors=2 * data["descriptors"])
    assert folder.difference(tmp_path / "ours", tmp_path / "plain") > 0.1
    (tmp_path / "plain/1.npz").unlink()
    assert folder.difference(tmp_path / "ours", tmp_path / "plain") == float("inf")
