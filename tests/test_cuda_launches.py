"""The CUDA launchers' calls of CUDA, recorded by a runtime that does nothing else; no GPU is needed."""

import re

import compiled
import pytest

ROOT = compiled.ROOT
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes():
    """{scene: its lines}; see tests/native/record_launches.cpp."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "tests" / "native" / "record_launches.cpp"]
    # No runtime but the one in record_launches.cpp.
    flags = ["-std=c++17", "-O1", "-arch=sm_90", '-DLIFT_FAST_CUDA_ARCHITECTURES="one"', "--cudart", "none"]
    program = compiled.program("record_launches", sources, flags, compiler="nvcc")
    text = compiled.run([program])
    found = {}
    for line in text.splitlines():
        scene, event = line.split(" ", 1)
        found.setdefault(scene, []).append(event)
    return found


def launches(events):
    return [event for event in events if event.startswith("cudaLaunchKernel ")]


def test_nothing_breaks_a_capture(scenes):
    """Not even the very first call does; and nothing uses the legacy stream, which a capture forbids."""
    events = [event for scene in scenes.values() for event in scene]
    assert len(launches(events)) > 20
    for mark in ("BREAKS-CAPTURE", "LEGACY-STREAM", "cudaMalloc", "cudaFree", "cudaMemcpy "):
        assert [event for event in events if mark in event] == []


def test_every_kernel_is_loaded_before_it_is_launched(scenes):
    """With lazy loading, which is CUDA's default, the first launch would load it."""
    for name in ("capture-after-probe", "first-call-in-capture", "large", "in-turn", "by-name"):
        assert launches(scenes[name])
        assert [event for event in scenes[name] if "NOT-LOADED" in event or "NOT-ALLOWED" in event] == []


def test_after_the_probe_a_launch_asks_for_nothing(scenes):
    calls = [event.split(" ")[0] for event in scenes["capture-after-probe"]]
    assert set(calls) == {"cudaGetDevice", "cudaSetDevice", "cudaLaunchKernel", "cudaGetLastError"}
    assert [event.split(" ")[0] for event in scenes["same-device"]] == [
        "cudaGetDevice",
        "cudaLaunchKernel",
        "cudaGetLastError",
    ]


def test_every_kernel_is_launched(scenes):
    kernels = {
        re.search(r"kernel=(\S+)", event)[1]
        for name in ("capture-after-probe", "by-name")
        for event in launches(scenes[name])
    }
    assert len([name for name in kernels if "image_encoder" in name]) == 18
    # Without the two for tables too large for shared memory.
    assert len([name for name in kernels if "match" in name or "mutual" in name]) >= 9


def test_launches_go_to_the_device_and_stream_that_were_named(scenes):
    for name, device, stream, before in (
        ("capture-after-probe", 1, 7, 0),
        ("first-call-in-capture", 0, 8, 1),
        ("same-device", 0, 9, 0),
    ):
        assert all(f" device={device} " in event and f" stream={stream}" in event for event in launches(scenes[name]))
        chosen = [event for event in scenes[name] if event.startswith("cudaSetDevice")]
        if device != before:
            assert chosen[-1] == f"cudaSetDevice device={before}"
        else:
            assert chosen == []


def test_tilings_follow_the_device(scenes):
    """The second device has fewer multiprocessors, and less shared memory."""
    limits = {0: 227 << 10, 1: 99 << 10}
    for events in scenes.values():
        for event in launches(events):
            device, shared = (int(re.search(rf"{name}=(\d+)", event)[1]) for name in ("device", "shared"))
            assert shared <= limits[device]
    values = {event for events in scenes.values() for event in events if event.startswith("cudaFuncSetAttribute")}
    assert values == {f"cudaFuncSetAttribute device={device} value={limit}" for device, limit in limits.items()}


def test_a_tiling_is_found_anew_where_the_call_changes(scenes):
    first, second = launches(scenes["in-turn"])[:5], launches(scenes["in-turn"])[5:]
    assert first == second
    assert len(set(first)) == 5


def test_the_probe(scenes):
    assert scenes["first-probe-in-capture"][-1] == "answer works=1 kernels compiled for compute_90 run"
    assert scenes["no-such-device"][-1] == "answer works=0 CUDA device 2 does not exist, there are 2"
    answer, after = scenes["failing-probe"][-2:]
    assert answer == "answer works=0 the probe: built for one, but a kernel fails: as if"
    assert after == "after device=0 last=0 mode=0"


def test_a_refused_launch_is_an_error_and_leaves_nothing_behind(scenes):
    error, after = scenes["refused"][-2:]
    assert error == "error image_encoder: the launch: as if"
    assert after == "after device=0 last=0"
