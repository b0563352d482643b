"""Which accelerated parts run on this machine, and why the others do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from . import _env


@dataclass(frozen=True)
class Part:
    """One accelerated part."""

    name: str
    runs: bool
    detail: str
    """A description if it runs, else the reason."""


@dataclass(frozen=True)
class Backends:
    """Result of :func:`backends`; prints as a table."""

    parts: tuple[Part, ...]

    def __getitem__(self, name: str) -> Part:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"no part {name!r}; there are {', '.join(part.name for part in self.parts)}")

    def __str__(self) -> str:
        return "\n".join(f"{part.name:12} {'yes' if part.runs else 'no':4} {part.detail}" for part in self.parts)

    def as_dict(self) -> dict[str, dict[str, object]]:
        """For JSON."""
        return {part.name: {k: v for k, v in asdict(part).items() if k != "name"} for part in self.parts}


def backends() -> Backends:
    """Which parts run on the CPU and the GPU of this machine. May initialise CUDA; importing the package does not.

    Returns:
        :class:`Backends` with the parts ``pytorch``, ``cpu native``, ``triton``, ``cuda native``, and the engines of
        backbones ``openvino`` and ``compile``.

    Raises:
        ValueError: for a LIFT_FAST_... environment variable with an unknown value.
    """
    _env.check()
    return Backends((_pytorch(), _cpu_native(), _triton(), _cuda_native(), _openvino(), _compile()))


# The package imports this file at its start, and PyTorch not before its first use.
def _pytorch() -> Part:
    import torch

    where = f"on {torch.cuda.get_device_name()} and the CPU" if torch.cuda.is_available() else "on the CPU"
    return Part("pytorch", True, f"plain implementations of every operator, PyTorch {torch.__version__} {where}")


def _cpu_native() -> Part:
    import torch

    from . import _native, devices

    module = _native.load()
    if module is None:
        return Part("cpu native", False, devices.native_runs()[1])
    available, wish = module.cpu_isas(), _env.cpu_isa()
    if wish != "auto" and wish not in available:
        return Part("cpu native", False, f"LIFT_FAST_CPU_ISA={wish}, but this CPU can run {', '.join(available)}")
    isa = available[0] if wish == "auto" else wish
    threads = (
        f"{torch.get_num_threads()} threads" if module.build_info()["openmp"] else "one thread, built without OpenMP"
    )
    search = module.nearest_search(wish).replace("int16", "16-bit integers")
    return Part(
        "cpu native",
        True,
        f"nearest (search in {search}, rescored in float32), dense_match, label propagation, cosine loss, "
        f"LiFT decoder, plain ViT backbones, bit matrix (object discovery); {isa} of {', '.join(available)}; {threads}",
    )


def _triton() -> Part:
    from . import devices

    runs, reason = devices.triton_runs()
    parts = "LiFT forward pass, cosine loss, nearest, dense_match, label propagation"
    return Part("triton", runs, f"{reason}: {parts}" if runs else reason)


def _cuda_native() -> Part:
    import torch

    from . import _native, devices

    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    runs, reason = devices.cuda_runs(torch.device("cuda", device))
    if runs:
        reason = f"{reason}: image encoder of the LiFT forward pass and dense_match, before Triton's"
    module = None if _env.cuda_disabled() else _native.load()
    built = module and module.build_info()["cuda_architectures"]
    return Part("cuda native", runs, f"{reason} (built for {built})" if built else reason)


def _openvino() -> Part:
    from .backbones.engines import openvino

    runs, reason = openvino.installed()
    if runs:
        reason = f"{reason}: backbones on the CPU; engine auto takes it for networks without native blocks, such as Eva"
    return Part("openvino", runs, reason)


def _compile() -> Part:
    import torch

    from .backbones.engines import compiled

    parts = [compiled.installed(kind) for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
    runs = any(found for found, _ in parts)
    reason = "; ".join(reason for _, reason in parts)
    return Part("compile", runs, f"{reason}: backbones with engine compile, never by itself" if runs else reason)
