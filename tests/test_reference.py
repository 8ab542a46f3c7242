"""docs/settings.md is complete and true."""

import pytest
import yaml

from tests.reference import (
    GROUPS,
    PAGE,
    Row,
    arguments_of,
    callbacks,
    called,
    matches,
    options,
    owned,
    page,
    yaml_comments,
)

UNBOUNDED = {"noise.logit_mean", "task.grow", "logger.version"}  # any number makes sense
OWNED = owned()
CALLED = [(group, path) for group in GROUPS[:-1] for path in options(group)]


def has_its_range(row: Row) -> bool:
    """Whether a setting that may be a number says which ones; also one whose type no signature tells."""
    may_be_number = "number" in row.type or not row.type
    return not may_be_number or bool(row.range) or row.name in UNBOUNDED


def test_the_page_is_what_the_sources_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.reference"


def test_there_are_settings_to_look_at():
    assert len(OWNED) >= 80
    assert len(CALLED) >= 35
    assert len(list(callbacks())) >= 7


@pytest.mark.parametrize("row", OWNED, ids=lambda row: row.name)
def test_what_otl_owns_is_explained_and_numbers_have_a_range(row):
    assert row.meaning, f"{row.name} has no comment beside its field"
    assert has_its_range(row), f"{row.name} has no range in otl/ranges.py"


@pytest.mark.parametrize(("group", "path"), CALLED, ids=lambda each: getattr(each, "stem", each))
def test_what_a_yaml_lists_is_explained(group, path):
    _, rows, _ = called(group, path)
    listed = set(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) - {"_target_", "defaults"}
    assert {row.name.partition(".")[2] for row in rows} >= listed
    assert [row.name for row in rows if not row.meaning] == []
    assert [row.name for row in rows if not has_its_range(row)] == [], "no range in otl/ranges.py"


def test_the_arguments_of_callbacks_are_explained_and_numbers_have_a_range():
    rows = [row for _, rows in callbacks() for row in rows]
    assert [row.name for row in rows if not row.meaning] == []
    assert [row.name for row in rows if not has_its_range(row)] == []


def test_comments_are_read_with_their_full_key():
    text = "a: 1 # one\nb:\n  c: '#' # two # three\n  d: 2\nb2: {e: 1} # four\n"
    assert yaml_comments(text) == {"a": "one", "b": "", "b.c": "two # three", "b.d": "", "b2": "four"}


def test_arguments_of_a_docstring():
    text = "What it is.\n\nArgs:\n    a: of one\n        line and more.\n    b, c: of both.\n\nRaises:\n    X: d.\n"
    assert arguments_of(text) == {"a": "of one line and more.", "b": "of both.", "c": "of both."}


@pytest.mark.parametrize(
    ("pattern", "name", "same"),
    [("a.*.b", "a.x.b", True), ("a.x.b", "a.*.b", True), ("a.*", "a.x.b", False), ("a.b", "a.c", False)],
)
def test_a_star_stands_for_one_name(pattern, name, same):
    assert matches(pattern, name) is same


def test_a_row_knows_its_range():
    assert Row("data.batch_size", "whole number", "1", "images").range == "at least 1"
