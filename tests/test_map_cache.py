"""An image that stands in many pairs goes through the networks once, whatever holds its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast import ViTLiFTExtractor, match_images
from lift_fast.map_cache import MapCache

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return ViTLiFTExtractor("vit_tiny_patch16_224", random_weights=True, random_lift=True, device="cpu", silent=True)


@pytest.fixture
def images():
    rng = np.random.default_rng()
    return [rng.integers(0, 255, (40, 48, 3), dtype=np.uint8) for _ in range(4)]


def test_maps_are_computed_once(images, monkeypatch, tmp_path):
    extractor, cache, seen = network(), MapCache(), []
    tokens = ViTLiFTExtractor._backbone_tokens
    monkeypatch.setattr(
        ViTLiFTExtractor,
        "_backbone_tokens",
        lambda self, batch, n: (seen.append(len(batch)), tokens(self, batch, n))[1],
    )

    def run(a, b, **options):
        seen.clear()
        found = match_images(a, b, extractor=extractor, size=32, cache=cache, timing=True, **options)
        assert tuple(found.seconds) == ("decode", "backbone", "lift", "match")
        return found

    first = run(images[0], images[1])
    assert seen == [1, 1]
    run(images[0], images[2])
    assert seen == [1]
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    again = run(tmp_path / "a.png", images[1])
    assert seen == []
    for name in ("xy_b", "similarity", "distance"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    run(images[3], images[3])
    assert seen == [1]
    # Another size, other repetitions of LiFT and another extractor have other maps.
    run(images[0], images[1], lift_iter=2)
    assert seen == [1, 1]
    changed = images[0].copy()
    changed[0, 0] ^= 255
    run(changed, images[1])
    assert seen == [1]
    before, extractor = extractor, network()
    run(images[0], images[1])
    assert seen == [1, 1]
    extractor = before
    run(images[0], images[1])
    assert seen == [1, 1]
    low = torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)
    assert cache.maps(extractor, 1, [low], lambda batches: [batch + 1 for batch in batches])[0].dtype == torch.bfloat16
    # Without a cache two images of one size go together; the same up to rounding.
    seen.clear()
    plain = match_images(images[0], images[1], extractor=extractor, size=32)
    assert seen == [2]
    assert (plain.similarity - first.similarity).abs().max() < 1e-4


def test_memory_is_bounded_and_the_last_used_are_kept():
    maps = {}

    def compute(batches):
        made = [torch.zeros(1, 10, 5, 5) for _ in batches]
        maps.update(zip([float(batch[0, 0, 0, 0]) for batch in batches], made, strict=True))
        return made

    cache, extractor = MapCache(2500), network()
    one, two, three, four = (torch.full((1, 3, 2, 2), float(i)) for i in range(1, 5))

    def computed(*batches):
        maps.clear()
        got = cache.maps(extractor, 1, batches, compute)
        assert len(got) == len(batches)
        assert cache._bytes == sum(kept.nbytes for kept in cache._maps.values())
        return sorted(maps)

    assert computed(one, two) == [1, 2]
    assert computed(one, one) == []
    # 1000 bytes each: the third takes the place of the second.
    assert computed(one, three) == [3]
    assert computed(one, two) == [2]
    assert computed(three, four) == [3, 4]
    assert len(cache._maps) == 2
    # A pair stays together, however small the cache.
    cache = MapCache(0)
    assert computed(one, two) == [1, 2]
    assert computed(two, one) == []
    assert computed(two, three) == [3]
    assert len(cache._maps) == 2


def test_bad_arguments(images):
    with pytest.raises(ValueError, match="max_bytes must be an integer"):
        MapCache(-1)
    with pytest.raises(TypeError, match=r"cache must be a lift_fast\.map_cache\.MapCache or None, got dict"):
        match_images(images[0], images[1], extractor=network(), cache={})
