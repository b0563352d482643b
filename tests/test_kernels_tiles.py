"""Tile shapes of LiFT's Triton kernels: those that fit, the chosen ones, and files of measured tiles."""

import json
import os

import pytest
import torch

from lift_fast import LiFT, tuning
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import tiles as tile_table

pytest.importorskip("triton")
from lift_fast.kernels import tiles

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORK = tile_table.Work("head", 3000, 192, 192, (3,), torch.bfloat16)


@pytest.fixture
def path(monkeypatch, tmp_path):
    """The file of the device's tiles, in a cache of its own."""
    monkeypatch.setenv("LIFT_FAST_CACHE", str(tmp_path))
    tile_table.forget()
    yield tile_table.cache_file(DEVICE)
    tile_table.forget()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 16, 192, 384])
@pytest.mark.parametrize("positions", [1, 100, 3136, 200704])
def test_default_tiles_fit(positions, channels, itemsize, capability):
    columns, depth = tiles.columns_of(channels), tiles.depth_of(itemsize, channels)
    counts = [tiles.padded(channels) // columns]
    tile = tiles.default(positions, columns, counts, depth, itemsize, capability)
    assert tiles.fits(tile, itemsize, capability)
    assert all(value & (value - 1) == 0 for value in (tile.rows, tile.columns, tile.depth, tile.warps))
    assert tile in tiles.candidates(columns, counts, depth, itemsize, capability)
    # Wide accumulators are to be measured first.
    assert not tile.wide


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 16, 64, 100, 192, 384, 768])
def test_candidates_fit(channels, itemsize, capability):
    columns, depth = tiles.columns_of(channels), tiles.depth_of(itemsize, channels)
    count = tiles.padded(channels) // columns
    counts = [pieces for pieces in (count, 3, 2, 1) if count % pieces == 0]
    found = tiles.candidates(columns, list(dict.fromkeys(counts)), depth, itemsize, capability)
    assert len(set(found)) == len(found)
    for tile in found:
        wide = tile.columns * tile.merged
        left = (tile.accumulators % tile.merged) * columns
        assert all(width & (width - 1) == 0 for width in (wide, left))
        assert wide <= 256
        assert tile.merged <= tile.accumulators
        block, bias = tile.accumulators * columns, min(tile.accumulators * columns, 192) * 32 * tile.wide
        staged = (tile.rows + block) * tile.depth * tile.stages
        assert itemsize * (staged + bias) <= tiles.shared_memory(capability)
        assert tile.rows * block // (32 * tile.warps) <= (192 if tile.merged > 1 and tile.warps == 8 else 96)
    # Products that read their operands from shared memory, and more than one accumulator.
    merged = any(tile.merged > 1 for tile in found)
    assert merged == (capability[0] in (9, 10) and itemsize == 2 and channels > 64)
    if capability[0] == 9 and channels == 192 and itemsize == 2:
        assert tiles.Tile(256, 64, 3, 64, 8, 3, 2) in found
        assert tiles.Tile(256, 64, 3, 64, 8, 4, 2) not in found
        # A report measures these first, because their speed is unknown.
        assert found[0].merged > 1


@pytest.mark.parametrize("number", [[], [1], [2]])
def test_files_hold_tiles_with_and_without_merged_accumulators(number, path):
    tile = [64, 64, 3, 64, 8, 2, *number]
    path.write_text(json.dumps({"format": 2, "tiles": {WORK.key(): tile}}))
    tile_table.forget()
    assert tile_table.tile_for(WORK, DEVICE) == tiles.Tile(64, 64, 3, 64, 8, 2, *number)


def test_tiles_of_the_kernels_as_they_were_are_passed_over(path):
    default = tile_table.tile_for(WORK, DEVICE)
    other = default._replace(rows=16, stages=2)
    path.write_text(json.dumps({"format": 1, "tiles": {WORK.key(): list(other)[:6]}}))
    tile_table.forget()
    assert tile_table.tile_for(WORK, DEVICE) == default


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_a_tile_fits_the_widest_features_that_are_served(capability, itemsize):
    assert gpu_plan.serves(2048)
    assert not gpu_plan.serves(4096)
    depth = tiles.depth_of(itemsize, 1024)
    assert tiles.fits(tiles.default(1, 64, [16], depth, itemsize, capability), itemsize, capability)


def test_chosen_tiles_are_kept_on_disk(path):
    before = tile_table.tile_for(WORK, DEVICE)
    other = before._replace(rows=16, stages=2)
    assert other != before
    tile_table.store(path, {WORK.key(): other})
    tile_table.forget()
    assert tile_table.tile_for(WORK, DEVICE) == other
    # Work of about the same size shares it, larger work does not.
    assert tile_table.tile_for(WORK._replace(positions=2500), DEVICE) == other
    assert tile_table.tile_for(WORK._replace(positions=300_000), DEVICE) != other
    tile_table.store(path, {"head other": before})
    tile_table.forget()
    assert tile_table.tile_for(WORK, DEVICE) == other
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "tiles": {"a": "b"}}',
        '{"format": 2, "tiles": {"a": [1]}}',
        '{"format": 2, "tiles": {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9]}}',
        "\0",
    ],
)
def test_a_broken_tile_file_is_named_and_passed_over(content, path):
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"tiles-.*\.json cannot be read"):
        assert tile_table.tile_for(WORK, DEVICE).columns == 64


def test_a_tile_that_no_longer_fits_is_passed_over(path):
    tile_table.store(path, {WORK.key(): tiles.Tile(4096, 64, 3, 64, 4, 3)})
    tile_table.forget()
    assert tile_table.tile_for(WORK, DEVICE).rows <= 128


def test_the_fastest_valid_tile_is_chosen(monkeypatch):
    work = tile_table.Work("head", 3000, 192, 192, (3,), torch.float32)
    tile_table.forget()
    first, others = tile_table.tile_for(work, DEVICE), tile_table.candidates(work, DEVICE)
    wrong, broken, best = [tile for tile in others if tile != first][:3]
    right = torch.randn(50)
    running = []

    def run(tile):
        running[:] = [tile]
        if tile == broken:
            raise RuntimeError("out of resource")
        return right + 1 if tile == wrong else right.clone()

    def milliseconds(call):
        call()
        return {wrong: 0.1, best: 0.5}.get(running[0], 1.0)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    assert tuning._fastest(work, DEVICE, run, quiet=True) == best
    tile_table.forget()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a machine without CUDA")
def test_tune_says_what_it_needs():
    with pytest.raises(RuntimeError, match=r"on cpu; move it with \.cuda\(\)"):
        tuning.tune(LiFT(16, 8), (1, 3, 32, 32))
