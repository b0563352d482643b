"""The jobs of each stage, in groups: a group is one process, unless a kernel ends it."""

from __future__ import annotations

from .context import Job

STAGES = ("build", "warm-up", "smoke", "figures", "tests", "sanitizer", "profile")


def jobs_of(stage: str, rehearse: bool) -> dict[str, list[Job]]:
    """The jobs of ``smoke``, ``figures`` or ``profile`` by group."""
    if stage == "smoke":
        from . import smoke

        return smoke.groups(rehearse)
    from . import figures

    return {"figures": figures.jobs(rehearse)} if stage == "figures" else {"profile": figures.profiled(rehearse)}
