"""Results of DAVIS in the form of JSON, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lift_fast.evaluation.tables import Column, Table

from .scores import MEASURES, SequenceScores, mean_measures


def content(
    scores: Mapping[str, Sequence[SequenceScores]],
    skipped: Mapping[str, str],
    options: Mapping[str, Any],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a run from the scores by method; ``skipped`` is what could not be predicted or scored, and why.

    Returns:
        ``"protocol", "complete", "options", "record", "skipped"``; ``"scores"``: method -> sequence -> ``"frames"``,
        ``"J"`` and ``"F"`` ``[objects][frames]`` and ``"objects"``, the measures of each, all from 0 to 1; and
        ``"summary"``: method -> measures in percent, means over all objects, with the number of ``"sequences"`` and
        ``"objects"`` in them.
    """
    return {
        "protocol": "davis",
        "complete": not skipped,
        "options": dict(options),
        "record": dict(record),
        "scores": {
            method: {
                s.name: {"frames": list(s.frames), "J": s.j.tolist(), "F": s.f.tolist(), "objects": s.objects()}
                for s in sequences
            }
            for method, sequences in scores.items()
        },
        "skipped": dict(skipped),
        "summary": {method: _summary(sequences) for method, sequences in scores.items()},
    }


def _summary(sequences: Sequence[SequenceScores]) -> dict[str, Any]:
    objects = [one for sequence in sequences for one in sequence.objects()]
    means = mean_measures(objects) if objects else dict.fromkeys(MEASURES)
    return {
        **{name: None if value is None else 100 * value for name, value in means.items()},
        "sequences": len(sequences),
        "objects": len(objects),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One table of all methods, in percent; none if nothing could be scored."""
    summary = result["summary"]
    columns = [Column(name, "low" if name.endswith("Decay") else "high") for name in MEASURES]
    counts = {(entry["sequences"], entry["objects"]) for entry in summary.values()}
    options = result["options"]
    if not any(objects for _, objects in counts):
        return []
    heading = f"DAVIS {options['year']}, {options['subset']}"
    if options["binary_masks"]:
        heading += ", binary masks"
    if options.get("protocol") == "dino":
        heading += ", DINO's protocol"
    if len(counts) == 1:
        sequences, objects = counts.pop()
        heading += f": {objects} objects in {sequences} sequences"
    rows = [(method, [entry[name] for name in MEASURES]) for method, entry in summary.items()]
    return [Table(heading, columns, rows)]
