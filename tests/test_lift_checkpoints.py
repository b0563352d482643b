"""Malformed LiFT files: each raises an error of one line, before anything large is allocated."""

from __future__ import annotations

import json
import resource
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lift_fast import LiFT, load_lift
from lift_fast.checkpoints import save_lift
from lift_fast.demonstration import LIFT
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8


@pytest.fixture
def state():
    return dict(randomize(LiFT(CHANNELS, 16), seed=1).state_dict())


def load(content, folder):
    torch.save(content, folder / "lift.pth")
    return load_lift(folder / "lift.pth", patch_size=16)


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def wrapped(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


def inner(state):
    """The state dict of a network with one compiled part."""
    return {name.replace("up1.", "up1._orig_mod.", 1): value for name, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        *map(wrapped, ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]),
        inner,
        lambda state: {k: int(v) if k.endswith("tracked") else v for k, v in state.items()},
        lambda state: {k: v.int() if k.endswith("tracked") else v for k, v in state.items()},
        lambda state: {k: v.double() for k, v in state.items()},
        lambda state: {k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in state.items()},
        lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
    ],
)
def test_what_loads_right(change, state, tmp_path):
    lift = load(change(state), tmp_path)
    assert_same(dict(lift.state_dict()), state)
    assert all(value.is_contiguous() for value in lift.state_dict().values())
    assert all(weight.requires_grad for weight in lift.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype, state, tmp_path):
    halves = {k: v.to(dtype) for k, v in state.items()}
    assert_same(dict(load(halves, tmp_path).state_dict()), {k: halves[k].to(v.dtype) for k, v in state.items()})
    assert all(weight.dtype == torch.float32 for weight in load(halves, tmp_path).parameters())


def test_counters_may_be_missing(state, tmp_path):
    save_file({k: v for k, v in state.items() if not k.endswith("tracked")}, tmp_path / "lift.safetensors")
    lift = load_lift(tmp_path / "lift.safetensors", patch_size=16)
    assert torch.equal(lift.outc.weight, state["outc.weight"])
    assert int(lift.up1.conv_1.double_conv[1].num_batches_tracked) == 0


NAME = "outc.bias"
BIG = 4096


def sparse(value):
    return value.to_sparse()


def jagged(value):
    return torch.nested.nested_tensor([value, value[:3]], layout=torch.jagged)


def quantized(value):
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sparse, "sparse"),
        (lambda v: torch.eye(CHANNELS).to_sparse_csr(), "sparse"),
        (jagged, r"nested|is a NestedTensor"),
        (quantized, "quantised"),
        (lambda v: v.to("meta"), r"without values \(device meta\)"),
        (lambda v: v.to(torch.float8_e5m2), "torch.float8_e5m2; expected floating point"),
        (lambda v: v.new_ones(1).expand(CHANNELS), r"overlapping elements \(shape \[8\], strides \[0\]\)"),
        (lambda v: torch.arange(9.0).as_strided((4, 2), (1, 1)), "overlapping elements"),
        (lambda v: v > 0, "torch.bool; expected floating point"),
        (lambda v: v.long(), "torch.int64; expected floating point"),
        (lambda v: v.cfloat(), "torch.complex64; expected floating point"),
        (lambda v: v.double() * 1e200, "8 of 8 values .* are not finite"),
        (lambda v: v.log(), "are not finite"),
        (lambda v: v.tolist(), "is a list; expected a tensor"),
        (lambda v: 3, "is an int; expected a tensor"),
        (lambda v: {"weight": v}, r"is a dictionary of 1 entries \(weight\); expected a plain state dict"),
        (lambda v: v[:5], r"1 of another shape \(outc\.bias: file \[5\], model \[8\]\)"),
        (lambda v: v.new_zeros([1] * 60), r"outc\.bias: file \[1, 1"),
    ],
)
def test_an_entry_that_is_no_weight(make, words, state, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        load({**state, NAME: make(state[NAME])}, tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "lift.pth"))
    assert NAME in text
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, "3", torch.tensor([1, 2]), torch.tensor(-1), torch.tensor(1j)])
def test_a_counter_that_counts_nothing(value, state, tmp_path):
    name = "image_convs_1.1.num_batches_tracked"
    with pytest.raises(ValueError, match=r"num_batches_tracked' is .*; expected a whole number of at least 0"):
        load({**state, name: value}, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, 5: s[NAME]}, "the name of an entry is an int"),
        (lambda s: {("a", "b"): s[NAME]}, "the name of an entry is a tuple"),
        (lambda s: {"state_dict": s}, r"entry 'state_dict' is a dictionary of 37 entries \(.*32 more\)"),
        (lambda s: {"model": s, "epoch": 3}, "entry 'model' is a dictionary of 37 entries"),
        (lambda s: {**s, "module." + NAME: s[NAME]}, "entry 'outc.bias' appears twice, also as 'module.outc.bias'"),
        (lambda s: {**s, "outc.weight": torch.zeros(())}, r"outc\.weight has shape \[\]"),
        (
            lambda s: {**s, "outc.weight": torch.zeros(10**9, 0, 1, 1)},
            r"outc\.weight has shape \[1000000000, 0, 1, 1\]",
        ),
        (lambda s: {**s, "outc.weight": torch.zeros(1, 1, 1, 1)}, "outc.weight has 1 channels, expected at least 2"),
        (lambda s: {**s, "outc.weight": torch.zeros(10**6, 1, 1, 1)}, "does not describe a valid LiFT: in_channels"),
        (lambda s: {**s, "image_convs_1.0.weight": torch.zeros(3)}, r"image_convs_1\.0\.weight has shape \[3\]"),
        (lambda s: {**s, "image_convs_1.1.running_var": -torch.ones(32)}, "holds negative variances"),
        (lambda s: {**s, "\x1b[31m": torch.zeros(1)}, r"1 unexpected \('\\x1b\[31m'\)"),
        (lambda s: {"x" * 100_000: torch.zeros(1)}, r"outc.weight is missing.*x\.\.\. \(100000 characters\)"),
        (lambda s: {f"{i}." * 300: torch.zeros(1) for i in range(2000)}, r"\.\.\. 1995 more"),
        (lambda s: {**s, **{f"x{i}": torch.zeros(1) for i in range(2000)}}, r"2000 unexpected \(.*1995 more"),
        (lambda s: {**s, **{f"image_convs_1.{i}.running_mean": torch.zeros(1) for i in range(4000)}}, "missing"),
        (lambda s: [s], "contains a list"),
        (lambda s: s[NAME], r"contains a tensor of shape \[8\]"),
        (lambda s: {}, "outc.weight is missing"),
    ],
)
def test_files_that_hold_something_else(change, words, state, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        load(change(state), tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "lift.pth"))
    assert text.isprintable()
    assert len(text) < 1500


def test_pytorchs_advice_is_not_repeated(tmp_path):
    for content in (nn.Linear(1, 1), {"outc.weight": nn.Linear(1, 1)}):
        with pytest.raises(ValueError, match=r"lift\.pth contains Python objects") as caught:
            load(content, tmp_path)
        assert "weights_only" not in str(caught.value)
    (tmp_path / "lift.pth").write_bytes(b"\x80\x02hello")
    with pytest.raises(ValueError, match="not a readable checkpoint") as caught:
        load_lift(tmp_path / "lift.pth", patch_size=16)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_small_file_makes_no_large_network(suffix, state, tmp_path):
    """outc.weight alone implies 16384 channels, a network of gigabytes; the file holds 2 x 1 numbers for each."""
    path = tmp_path / f"lift{suffix}"
    content = {**state, "outc.weight": torch.zeros(16384, 2, 1, 1)}
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"does not fit LiFT\(16384, 16\).*of another shape \(.*more\)"):
        load_lift(path, patch_size=16)
    # In kB on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_compressed_archives_are_refused(state, tmp_path):
    torch.save(state, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(tmp_path / "lift.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"lift\.pth is not a readable checkpoint \(its record .* is compressed"):
        load_lift(tmp_path / "lift.pth", patch_size=16)


def test_a_flipped_bit_is_noticed(state, tmp_path):
    torch.save(state, tmp_path / "lift.pth")
    content = bytearray((tmp_path / "lift.pth").read_bytes())
    at = content.find(state["outc.weight"].numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "lift.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"record lift/data/\d+ is damaged, the checksum differs"):
        load_lift(tmp_path / "lift.pth", patch_size=16)


def test_files_without_checksums_load(state, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        assert_same(dict(load(state, tmp_path).state_dict()), state)
    finally:
        torch.serialization.set_crc32_options(True)


def test_files_of_the_old_format_load(state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(dict(load_lift(tmp_path / "old.pth", patch_size=16).state_dict()), state)


def test_the_result_lives_without_the_file(state, tmp_path):
    for path in (tmp_path / "lift.pth", tmp_path / "lift.safetensors"):
        save_lift(load(state, tmp_path), path)
        lift = load_lift(path, patch_size=16)
        with path.open("r+b") as file:
            file.truncate(0)
        assert_same(dict(lift.state_dict()), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_compiled_and_parallel_modules_are_saved_under_the_published_names(suffix, state, tmp_path):
    lift = LiFT(CHANNELS, 16)
    lift.load_state_dict(state)
    compiled = torch.compile(lift)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    for module in (compiled, nn.DataParallel(lift)):
        path = tmp_path / f"lift{suffix}"
        save_lift(module, path)
        content = torch.load(path, weights_only=True) if suffix == ".pth" else load_file(path)
        assert content.keys() == state.keys()
        assert_same({name: content[name] for name in state}, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_defaults_of_the_program_change_nothing(dtype, device, state, tmp_path):
    torch.save(state, tmp_path / "lift.pth")
    save_file(state, tmp_path / "lift.safetensors")
    files = tmp_path / "lift.pth", tmp_path / "lift.safetensors", LIFT
    expected = [dict(load_lift(file, patch_size=16).state_dict()) for file in files]
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            before = torch.get_rng_state()
            found = [load_lift(file, patch_size=16) for file in files]
            assert torch.equal(torch.get_rng_state(), before)
            # A new module follows the defaults, as every nn.Module does.
            if device == "meta":
                assert (LiFT(8, 16).outc.weight.dtype, LiFT(8, 16).outc.weight.device.type) == (dtype, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
    for lift, wanted in zip(found, expected, strict=True):
        assert_same(dict(lift.state_dict()), wanted)
        assert {value.dtype for value in lift.parameters()} == {torch.float32}
        assert {value.device.type for value in lift.state_dict().values()} == {"cpu"}


def test_map_location(state, tmp_path):
    torch.save(state, tmp_path / "lift.pth")
    lift = load_lift(tmp_path / "lift.pth", patch_size=16, map_location="meta")
    assert {value.device.type for value in lift.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match=r"cannot write .*no\.pth: the weights are on the device meta"):
        save_lift(lift, tmp_path / "no.pth")
    for wrong in ("nowhere", 1.5, None):
        with pytest.raises(ValueError, match="map_location must be a device"):
            load_lift(tmp_path / "lift.pth", patch_size=16, map_location=wrong)


@pytest.mark.parametrize("device", ["cuda:99", "mps", "xla", "hpu"])
def test_map_location_of_a_device_that_is_not_here(device, state, tmp_path):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    torch.save(state, tmp_path / "lift.pth")
    with pytest.raises(ValueError, match=f"map_location must be a device of this machine.*{device}"):
        load_lift(tmp_path / "lift.pth", patch_size=16, map_location=device)


def _set(path, value):
    def edit(lift):
        owner, _, name = path.rpartition(".")
        setattr(lift.get_submodule(owner), name, value)

    return edit


def _spoil(lift):
    with torch.no_grad():
        lift.outc.weight[3] = float("nan")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("up1.conv_1.double_conv.1.eps", 1.0), "eps 1.0"),
        (_set("image_convs_1.2", nn.GELU()), "was edited"),
        (_set("scale_adapter", nn.AvgPool2d(2)), "was edited"),
        (_set("image_convs_1.1.weight", None), "1 missing.*image_convs_1.1.weight"),
        (_spoil, "not finite"),
    ],
    ids=["eps", "activation", "pool", "affine", "nan"],
)
def test_what_a_checkpoint_cannot_hold_is_not_written(edit, words, tmp_path):
    lift = LiFT(CHANNELS, 16)
    edit(lift)
    with pytest.raises(ValueError, match=rf"cannot write .*lift\.pth: .*{words}"):
        save_lift(lift, tmp_path / "lift.pth")
    assert not any(tmp_path.iterdir())


def test_only_a_lift_is_written_and_only_to_a_file(tmp_path):
    for other in (None, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="expected a LiFT, got a"):
            save_lift(other, tmp_path / "lift.pth")
    for path in ("", tmp_path):
        with pytest.raises(ValueError, match="names no file"):
            save_lift(LiFT(CHANNELS, 16), path)


def test_parametrised_and_partly_compiled_weights_are_written_as_they_come_out(tmp_path):
    lift = LiFT(CHANNELS, 16)
    nn.utils.parametrizations.weight_norm(lift.outc)
    with torch.no_grad():
        lift.outc.parametrizations.weight.original0.mul_(2)
    lift.up1 = torch.compile(lift.up1)
    save_lift(lift, tmp_path / "lift.pth")
    again = load_lift(tmp_path / "lift.pth", patch_size=16)
    assert list(again.state_dict()) == list(LiFT(CHANNELS, 16).state_dict())
    assert torch.equal(again.outc.weight, lift.outc.weight)
    assert torch.equal(again.up1.up.weight, lift.up1.up.weight)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing.*in_channels and patch_size"),
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ({"in_channels": CHANNELS}, "missing or lacks patch_size"),
        ({"in_channels": CHANNELS, "patch_size": "a"}, "patch_size must be"),
        ({"in_channels": CHANNELS + 2, "patch_size": 16}, rf"model\.safetensors: in_channels is {CHANNELS + 2}"),
        ({"in_channels": CHANNELS, "patch_size": 16, "use_image": False}, "use_image is False"),
        ({"in_channels": CHANNELS, "patch_size": 16, "image_channels": 8}, "image_channels is 8"),
        ({"in_channels": CHANNELS, "patch_size": 16, "extra_image_blocks": 1}, "extra_image_blocks is 1"),
    ],
)
def test_a_config_that_does_not_describe_its_weights(content, words, tmp_path):
    LiFT(CHANNELS, 16).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json.*{words}"):
        LiFT.from_pretrained(tmp_path)
