"""Reports versions, devices and backends of this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _env, _native
from .backends import backends
from .precision import resolve_dtype

_PACKAGES = ("lift_fast", "torch", "timm", "triton", "openvino", "numpy", "pillow", "safetensors", "huggingface_hub")


def report() -> dict[str, Any]:
    """The report as plain data for JSON. May initialise CUDA."""
    module = _native.load()
    places = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "cuda": {
            "of PyTorch": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "dtype auto": {place: _auto(place) for place in places},
        "native core": module.build_info() if module else None,
        "backends": backends().as_dict(),
        "environment": {name: os.environ.get(name, "") for name in _env.VARIABLES},
    }


def report_text() -> str:
    """The report as text."""
    data = report()
    lines = [f"{name:16} {value or 'not installed'}" for name, value in data["versions"].items()]
    lines += [
        f"{'platform':16} {data['platform']}",
        f"{'CPU':16} {data['cpu']['capability']}, {data['cpu']['threads']} threads",
        f"{'CUDA':16} {data['cuda']['of PyTorch'] or 'none'} in PyTorch; "
        f"devices: {', '.join(data['cuda']['devices']) or 'none'}",
        f"{'dtype auto':16} {', '.join(f'{dtype} on {place}' for place, dtype in data['dtype auto'].items())}",
        "",
        "backends",
        *(f"  {line}" for line in str(backends()).splitlines()),
        "",
        "environment",
        *(f"  {name}={data['environment'][name] or '(not set)'}   {what}" for name, what in _env.VARIABLES.items()),
    ]
    return "\n".join(lines)


def _auto(place: str) -> str:
    return str(resolve_dtype("auto", torch.device(place))).removeprefix("torch.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
