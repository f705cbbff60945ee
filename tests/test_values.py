"""The grammar of values: what is read, what is refused and why, and MedCalc-Bench's answers."""

import collections
import datetime
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.load import load
from medrlvr_jax.data.values import (
    REASONS,
    Unreadable,
    convert,
    matches,
    read_date,
    read_duration,
    read_labels,
    read_number,
    read_reference,
)

MEDCALC = Path(__file__).parents[2] / "shared/data/medcalc/test_data.csv"


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12", 12, None),
        ("-1,234.5 mg/dL", Fraction(-12345, 10), "mg/dL"),
        ("−5", -5, None),
        ("1,234,567", 1234567, None),
        (".5", Fraction(1, 2), None),
        ("5.", 5, None),
        ("2.5e-3", Fraction(25, 10**4), None),
        ("3 × 10^4 /µL", 30000, "/µL"),
        ("98 %", 98, "%"),
        ("12 mL/min/1.73 m²", 12, "mL/min/1.73 m²"),
        ("120 mm Hg.", 120, "mm Hg"),
    ],
)
def test_numbers_that_are_read(text, value, unit):
    number = read_number(text)
    assert number.value == value and (number.unit or "").rstrip(".") == (unit or "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,234", "ambiguous_number"),
        ("140/3.5", "not_a_number"),
        ("2+2", "not_a_number"),
        ("5 5", "not_a_number"),
        ("1 234", "not_a_number"),
        ("12,34", "not_a_number"),
        ("1e999", "unknown_unit"),
        ("twelve", "not_a_number"),
        ("٣", "not_a_number"),
        ("about 5", "not_a_number"),
        ("5 bananas", "unknown_unit"),
        ("__import__('os')", "not_a_number"),
        ("", "not_a_number"),
    ],
)
def test_numbers_that_are_refused(text, reason):
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        read_number(text)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1500 mg", "g", Fraction(3, 2)),
        ("1 g/L", "mg/dL", 100),
        ("2 hours", "min", 120),
        ("72 bpm", "beats/min", 72),
        ("0.2 mg/mL", "µg/mL", 200),
        ("24 kg/m2", "kg/m²", 24),
        ("7", "mg", 7),
    ],
)
def test_units_of_one_quantity_are_converted(text, unit, value):
    assert convert(read_number(text), unit) == value


def verdict(text, /, **row):
    """Return `right`, `wrong`, or the reason why the answer is not a value."""
    try:
        return "right" if matches(text, read_reference(row)) else "wrong"
    except Unreadable as e:
        return str(e)


def test_a_unit_of_another_quantity_or_without_need_is_an_error():
    within = {"kind": "number", "answer": 5, "lower": 4, "upper": 6, "unit": "mg/dL"}
    assert verdict("5 mmol/L", **within) == "other_dimension" and verdict("0.05 g/L", **within) == "right"
    assert verdict("5 mg", kind="integer", answer=5) == "unit_not_asked"


def test_limits_are_included():
    within = {"kind": "number", "answer": "0", "lower": 0, "upper": 0.5}
    answers = {"0": "right", "-0": "right", "0.5": "right", "0.500001": "wrong", "-0.1": "wrong"}
    assert {text: verdict(text, **within) for text in answers} == answers
    assert verdict("-5.25", kind="number", answer=-5, tolerance=0.05) == "right"
    assert verdict("-5.26", kind="number", answer=-5, tolerance=0.05) == "wrong"
    percent = {"kind": "number", "answer": 100, "tolerance": "5 %"}
    assert (verdict("105", **percent), verdict("106", **percent)) == ("right", "wrong")
    grams = {"kind": "number", "answer": "1500 mg", "lower": "1400 mg", "upper": 1.6, "unit": "g"}
    assert [verdict(text, **grams) for text in ("1.4", "1.39", "1.6 g")] == ["right", "wrong", "right"]
    assert verdict("4.0", kind="integer", answer=4) == "right"
    assert verdict("4.2", kind="integer", answer=4) == "not_an_integer"


@pytest.mark.parametrize(
    "text", ["2024-03-04", "4 March 2024", "March 4, 2024", "4th Mar 2024", "Mar. 4 2024"]
)
def test_dates_in_unambiguous_forms(text):
    assert read_date(text) == datetime.date(2024, 3, 4)


def test_dates_with_slashes_are_ambiguous_without_an_order():
    with pytest.raises(Unreadable, match="ambiguous_date"):
        read_date("03/04/2024")
    assert read_date("03/04/2024", "month_first") == datetime.date(2024, 3, 4)
    assert read_date("03/04/2024", "day_first") == datetime.date(2024, 4, 3)
    assert read_date("25/12/2024") == read_date("12/25/2024") == datetime.date(2024, 12, 25)
    assert read_date("05/05/2024") == datetime.date(2024, 5, 5)
    for text in ("2024-02-30", "31 June 2024", "4 Marsh 2024", "04.03.2024", "yesterday", "13/13/2024"):
        with pytest.raises(Unreadable, match="not_a_date"):
            read_date(text)


def test_durations_are_days():
    for text in (
        "14 weeks 2 days",
        "14 weeks, 2 days",
        "14 weeks and 2 days",
        "100 days",
        "('14 weeks', '2 days')",
    ):
        assert read_duration(text) == 100
    assert read_duration("1 week") == 7 and read_duration("0 days") == 0
    for text in ("", "14", "2 months", "weeks", "14.5 weeks"):
        with pytest.raises(Unreadable, match="not_a_duration"):
            read_duration(text)


def test_labels_in_any_order_and_case():
    allowed = ("eligible", "excluded", "not relevant")
    assert read_labels("Eligible; not  Relevant", allowed) == ("eligible", "not relevant")
    for text, reason in (("eligible, eligible", "repeated_label"), ("maybe", "unknown_label")):
        with pytest.raises(Unreadable, match=reason):
            read_labels(text, allowed)
    wanted = {"kind": "labels", "answer": "excluded", "labels": allowed}
    assert verdict("EXCLUDED.", **wanted) == "right" and verdict("eligible", **wanted) == "wrong"
    assert verdict("a; b", kind="labels", answer=["b", "a"], labels=["a", "b", "c"]) == "right"


def test_texts_by_alias():
    wanted = {"kind": "text", "answer": "myocardial infarction", "aliases": ["heart attack"]}
    assert verdict("  Heart   Attack. ", **wanted) == "right" and verdict("heart", **wanted) == "wrong"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "choice", "answer": "A"}, "field kind: 'choice' is none of number, integer"),
        (
            {"kind": "number", "answer": "1,234"},
            "field answer: '1,234' cannot be read as a value of kind number: a single",
        ),
        ({"kind": "number", "answer": "5 mg"}, "a unit where the reference has none"),
        ({"kind": "number", "answer": 5, "unit": "bananas"}, "the unit is not in the table"),
        (
            {"kind": "number", "answer": 5, "lower": 6, "upper": 4},
            "5 is not within lower 6, upper 4; put the limits in order",
        ),
        (
            {"kind": "number", "answer": 5, "lower": 4, "tolerance": 0.1},
            "field tolerance: the record also has lower or upper",
        ),
        ({"kind": "number", "answer": 5, "lower": "4,000"}, "field lower: '4,000' cannot be read as a value"),
        ({"kind": "number", "answer": 5, "tolerance": "5 mg"}, "field tolerance: '5 mg' cannot be read as a"),
        (
            {"kind": "number", "answer": 5, "unit": "mgg"},
            "field unit: 'mgg' cannot be read as a value of kind",
        ),
        ({"kind": "integer", "answer": 4.5}, "a number with a fraction"),
        ({"kind": "date", "answer": "03/04/2024"}, "day or month first"),
        ({"kind": "date", "answer": "03/04/2024", "order": "usa"}, "field order: 'usa' is neither"),
        ({"kind": "labels", "answer": "a", "labels": ["b"]}, "not one of the labels"),
        ({"kind": "label", "answer": "a", "labels": "a, b"}, "field labels: 'a, b' is not a list"),
        ({"kind": "text", "answer": "aspirin", "aliases": "ASA"}, "field aliases: 'ASA' is not a list"),
        ({"kind": "text", "answer": " "}, "field answer: '' has 0 characters"),
    ],
)
def test_references_that_cannot_be_read_are_refused_with_the_field(row, message):
    with pytest.raises(Unreadable) as refused:
        read_reference(row)
    assert message in str(refused.value)


VALUES = {
    "number": "1",
    "integer": "1",
    "date": "2024-01-01",
    "duration": "1 day",
    "labels": "a",
    "text": "a",
}


@given(st.text(max_size=300), st.sampled_from(list(VALUES)))
def test_any_text_gives_a_verdict_or_a_reason(text, kind):
    assert verdict(text, kind=kind, answer=VALUES[kind], labels=["a", "b"]) in ("right", "wrong", *REASONS)


def test_hostile_answers_take_linear_time():
    hostile = ["1," * 99, "1" * 200, "1 " * 100, "mg/" * 66, "−" * 200, "1" * 199 + "e", "e" * 10**6]
    began = time.perf_counter()
    assert all(verdict(text, kind="number", answer=1) != "right" for text in hostile * 100)
    assert time.perf_counter() - began < 2


@pytest.mark.skipif(not MEDCALC.exists(), reason="MedCalc-Bench's test rows are not beside the project")
def test_medcalc_answers_are_right_and_others_wrong():
    questions = load(SetConfig(path=str(MEDCALC)))
    assert len(questions) == 1047
    counts = collections.Counter(q.value.kind for q in questions)
    assert counts == {"number": 627, "integer": 360, "date": 40, "duration": 20}
    for q in questions:
        value = q.value
        assert matches(value.text, value), q.id
        match value.kind:
            case "date":
                other = (value.value + datetime.timedelta(days=1)).isoformat()
                assert matches(value.value.isoformat(), value), q.id
            case "duration":
                other = f"{value.value + 1} days"
            case "integer":
                other = str(int(value.value) + 1)
            case _:
                other = format(float(value.value * Fraction("1.06")) or 0.01, "f")
        assert not matches(other, value), q.id
