"""What an extraction of labels finds beside them, for those who read kept labels and for reports.

`hymate.data.extraction` extracts; it takes polars, which its readers need not import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hymate.config import TaskConfig
from hymate.errors import UserError

SUMMARY = "counts.json"
CODE_ALONE = "_code_of_{}"  # a predicate with bounds on its value, without them


@dataclass(frozen=True)
class Details:
    """What an extraction finds beside the labels.

    excluded: how many triggers each window leaves out.
    kinds: how many first events in the label window are of each of the task's kinds, counted or left out.
    predicates: how many events of the dataset each plain predicate of the definition matches.
    deaths: how many of the dataset's deaths have a date and no time of day, by where on that day they were put.
    """

    excluded: dict[str, int]
    kinds: dict[str, int]
    predicates: dict[str, int]
    deaths: dict[str, int] = field(default_factory=dict)  # older results have none

    def unmatched(self) -> dict[str, str]:
        """The predicates that match no event, and why where it is known; see `Predicates.matches`."""
        found = {}
        for name, count in self.predicates.items():
            if not count and not name.startswith(CODE_ALONE.format("")):
                of_code = self.predicates.get(CODE_ALONE.format(name), 0)
                found[name] = f"{of_code} events have the code of {name}, but no value in its range" if of_code else ""
        return found


def no_event_error(task: TaskConfig, role: str, names: list[str], without: Mapping[str, str]) -> UserError:
    assert task.definition is not None
    keys = [
        f"task.definition.{'predicates' if name in task.definition['predicates'] else 'patient_demographics'}.{name}"
        for name in names
    ]
    why = "".join(f" ({without[name]})" for name in names if without[name])
    return UserError(
        f"task {task.name}: no event matches its {role} {', '.join(names)}{why}: set {' and '.join(keys)} to the codes "
        "of this dataset (metadata/codes.parquet)"
    )
