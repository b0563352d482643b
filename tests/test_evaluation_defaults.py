"""Evaluations do not depend on PyTorch's global defaults: every tensor they make names its dtype and device."""

import numpy as np
import pytest
import torch
from evaluation_data import make_spair, make_voc, sizes_and_boxes, voc_object, write_davis
from PIL import Image
from test_evaluation_tokencut import planted
from timm.models.vision_transformer import VisionTransformer

from lift_fast import LiFT
from lift_fast.backbones import FrozenViT
from lift_fast.evaluation import cka, discovery, spair, warp
from lift_fast.evaluation.bit_graph import BitGraph
from lift_fast.evaluation.cost import method_cost, published_count
from lift_fast.evaluation.davis import Davis, Job, Network, PropagationOptions, predict_dataset, score_folder
from lift_fast.evaluation.discovery.dataset import read_voc
from lift_fast.evaluation.methods import Batch, build_methods
from lift_fast.evaluation.tokencut import second_eigenvector, similarity_graph, tokencut
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


class Defaults:
    """A context with other defaults; the dtype's setting is global and must be taken back."""

    def __init__(self, dtype=None, device=None):
        self.dtype, self.device = dtype, device

    def __enter__(self):
        self.before = torch.get_default_dtype()
        if self.dtype is not None:
            torch.set_default_dtype(self.dtype)
        if self.device is not None:
            self.device.__enter__()

    def __exit__(self, *_):
        if self.device is not None:
            self.device.__exit__(None, None, None)
        torch.set_default_dtype(self.before)


def others():
    yield Defaults(dtype=torch.bfloat16)
    yield Defaults(dtype=torch.float64)
    yield Defaults(device=torch.device("meta"))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    backbone = FrozenViT(model, head_order="interleaved")
    return backbone, randomize(LiFT(24, 16), 0).eval()


def same(compute):
    """The value of ``compute`` is the same under all defaults."""
    expected = compute()
    for defaults in others():
        with defaults:
            found = compute()
        assert equal(found, expected), defaults.__dict__
    return expected


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("native", [None, False])
def test_tokencut(native):
    features = planted(9, 12, 1)[0]

    def cut():
        found = tokencut(features, (9, 12))
        return found.eigenvector, found.cells, found.seed, found.value

    def graph():
        made = BitGraph(108, native=native)
        unit = torch.nn.functional.normalize(features, dim=1)
        for start in (0, 64):
            stop = min(start + 64, 108)
            made.set_rows(start, unit[start:stop] @ unit[:stop].T, 0.2)
        made.close()
        pairs = [second_eigenvector(made, solver=solver) for solver in ("lanczos", "dense")]
        return made.degree, made.dense(), made.diagonal(), made.has_edges(), [(p.vector, p.value) for p in pairs]

    assert not tokencut(features, (9, 12)).degenerate
    same(cut)
    same(graph)
    same(lambda: similarity_graph(features, 0.2).dense())


def test_cka(networks, tmp_path):
    backbone, lift = networks
    x, y = torch.randn(40, 6), torch.randn(40, 9)

    def streamed():
        sums = cka.StreamingCKA()
        for part in (slice(0, 11), slice(11, 40)):
            sums.update(x[part], y[part])
        return sums.value()

    same(streamed)
    same(lambda: cka.linear_cka(x, y))
    same(lambda: cka.centres(3, 4))
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    methods = [(m.name, m) for m in build_methods(["backbone", "bilinear", "double-size", "lift"], backbone, lift)]
    options = {"sizes": (48, 56), "reference": 64, "grid": 5, "mean": backbone.mean, "std": backbone.std}
    same(lambda: cka.scale_invariance(methods, sorted(tmp_path.iterdir()), **options))


def test_methods(networks):
    backbone, lift = networks
    imgs = torch.randn(2, 3, 56, 56)

    def maps():
        methods = build_methods(["backbone", "bilinear", "double-size", "stride-8", "lift", "lift-2"], backbone, lift)
        batch = Batch(imgs)
        return [tuple(method(batch)) for method in methods]

    same(maps)


def test_cost(networks):
    backbone, _ = networks
    same(lambda: [vars(method_cost(name, backbone, 48)) for name in ("backbone", "lift", "lift-2", "stride-8")])
    imgs, tokens = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 24)
    plain = randomize(LiFT(24, 16), 0).eval()
    plain.fused = False
    same(lambda: published_count(plain, imgs, tokens))


def test_spair(networks, tmp_path):
    backbone, lift = networks
    root = make_spair(tmp_path, 0)

    def scores():
        data = spair.SPair(root)
        methods = build_methods(["backbone", "lift"], backbone, lift)
        return spair.evaluate(methods, backbone, data, data.select(), sizes=[56])

    assert same(scores)["scores"]


def test_warp(networks, tmp_path):
    backbone, lift = networks
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (120, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    methods = build_methods(["backbone", "lift"], backbone, lift)
    paths = sorted(tmp_path.iterdir())
    assert same(lambda: warp.evaluate(methods, backbone, paths, tmp_path, sizes=[48]))["scores"]


def test_discovery(networks, tmp_path):
    backbone, lift = networks
    make_voc(tmp_path, {f"{i}": (size, box, [voc_object(box)]) for i, (size, box) in enumerate(sizes_and_boxes(0, 2))})
    methods = [(method.name, method) for method in build_methods(["backbone", "lift"], backbone, lift)]

    def found():
        data = read_voc(tmp_path, 2007)
        return [discovery.evaluate(methods, backbone, data, tau=0.2, resolution=side) for side in (None, 56)]

    assert same(found)


def test_davis(networks, tmp_path):
    backbone, lift = networks
    root = write_davis(tmp_path / "davis", sequences=1)
    count = 0

    def scores(network, options):
        nonlocal count
        count += 1
        data = Davis(root)
        jobs = [Job(f"{i}", m, tmp_path / f"{count}-{i}", {}) for i, m in enumerate(network.methods)]
        done = predict_dataset(data, jobs, network, options)
        assert not done.problems
        return [[(one.j, one.f) for one in score_folder(data, job.folder)[0]] for job in jobs]

    methods = build_methods(["backbone", "lift", "stride-8"], backbone, lift)
    network = Network(methods, backbone.mean, backbone.std, backbone.patch_size)
    for options in (
        PropagationOptions(size=56, radius=2),
        PropagationOptions(size=64, radius=2, placement="cover"),
        PropagationOptions(size=64, radius=2, protocol="dino"),
    ):
        same(lambda options=options: scores(network, options))
