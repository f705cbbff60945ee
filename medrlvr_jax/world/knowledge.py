"""The embedded world's table of clinical knowledge, `embedded/knowledge.yaml`, and queries on it."""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from medrlvr_jax.config import load as configs


@dataclass(frozen=True)
class Condition:
    """A condition of the table.

    `typical`, `rare`: its findings. `first`: the first-line drug. `unless`: the alternative drug, by the
    history that bars the first line. `also`: other drugs that a clinician could defend. `skip`: histories
    with which no question is made.
    """

    name: str
    who: tuple[str, int, int]  # sex or "any", youngest, oldest
    typical: tuple[str, ...]
    rare: tuple[str, ...]
    first: str
    unless: dict[str, str]
    also: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drug:
    """A drug of the table. `avoid`: histories that bar it; `care`: histories never combined with it."""

    name: str
    group: str
    avoid: tuple[str, ...] = ()
    care: tuple[str, ...] = ()


class Table(NamedTuple):
    conditions: dict[str, Condition]
    drugs: dict[str, Drug]
    histories: tuple[str, ...]
    doses: dict[str, int]  # mg


@cache
def table() -> Table:
    """Read `embedded/knowledge.yaml`."""
    file = Path(__file__).parent / "embedded" / "knowledge.yaml"
    tree = configs.read_yaml(file, "install the package again")

    def frozen(row: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}

    drugs = {name: Drug(name, row.pop("class"), **frozen(row)) for name, row in tree["drugs"].items()}
    conditions = {name: Condition(name, **frozen(row)) for name, row in tree["conditions"].items()}
    return Table(conditions, drugs, tuple(tree["histories"]), tree["doses"])


def finding_sets(condition: Condition) -> list[tuple[str, ...]]:
    """Return the sets of two or three findings that only this condition has."""
    findings = sorted(condition.typical + condition.rare)
    others = [{*c.typical, *c.rare} for c in table().conditions.values() if c.name != condition.name]
    sets = [chosen for size in (2, 3) for chosen in itertools.combinations(findings, size)]
    return [chosen for chosen in sets if not any(set(chosen) <= other for other in others)]


def histories(condition: Condition) -> tuple[list[str], list[str]]:
    """Return (harmless histories, histories that bar the first line and have an alternative)."""
    drug, (sex, low, high) = table().drugs[condition.first], condition.who
    fertile = sex != "man" and max(low, 20) <= min(high, 40)
    fits = [h for h in table().histories if h not in condition.skip and (h != "pregnancy" or fertile)]
    return [h for h in fits if h not in drug.avoid + drug.care], [h for h in fits if h in condition.unless]


@cache
def wrong_options(condition: str, drug: str, by_class: bool) -> tuple[str, ...]:
    """Return wrong options for `drug`, or for its class: none that a clinician could defend here."""
    c, drugs = table().conditions[condition], table().drugs
    defended = {c.first, *c.unless.values(), *c.also}
    if by_class:
        return tuple(sorted({d.group for d in drugs.values()} - {drugs[name].group for name in defended}))
    return tuple(d.name for d in drugs.values() if d.name not in defended and d.group != drugs[drug].group)
