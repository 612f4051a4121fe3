"""Parts of the slow tests: all of them together, none twice, the same in every process."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import slow_parts

pytest_plugins = "pytester"


@given(st.sets(st.text(max_size=5)), st.integers(1, 9))
def test_parts_are_disjoint_whole_and_balanced(node_ids, parts):
    chosen = [slow_parts.select(node_ids, part, parts) for part in range(1, parts + 1)]
    assert set().union(*chosen) == node_ids
    sizes = [len(part) for part in chosen]
    assert sum(sizes) == len(node_ids)
    assert max(sizes) - min(sizes) <= 1


def test_a_new_test_moves_few_others():
    node_ids = [f"tests/test_some.py::test[{number}]" for number in range(300)]
    for new in ("a", "b", "c"):
        moved = 0
        for part in range(1, 8):
            before = slow_parts.select(node_ids, part, 7)
            moved += len(before - slow_parts.select([*node_ids, new], part, 7))
        assert moved <= 6  # one at each boundary


def test_parts_are_those_that_they_always_were():
    """In every process, whatever PYTHONHASHSEED: the order is that of sha256sum."""
    assert slow_parts.select(list("abcdefg"), 1, 7) == {"d"}
    assert slow_parts.select(list("abcdefg"), 7, 7) == {"g"}


def test_what_is_no_part_is_refused():
    assert slow_parts.parse("7/7") == (7, 7)
    for text in ("", "3", "0/7", "8/7", "3/0", "-1/7", "a/7", "1/7/2", "3 of 7"):
        with pytest.raises(ValueError, match=r"--slow-part .*write K/N with 1 <= K <= N"):
            slow_parts.parse(text)


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """Twenty slow tests and two others, with the hooks and the default of setup.cfg."""
    pytester.makeconftest("from tests.conftest import *")
    pytester.makeini('[pytest]\naddopts = -m "not slow"\nmarkers =\n    slow: long\n    other: one')
    pytester.makepyfile(
        test_slow="""
        import pytest
        @pytest.mark.slow
        @pytest.mark.parametrize("n", range(20))
        def test_slow(n): pass
        """,
        test_others="""
        import pytest
        def test_plain(): pass
        @pytest.mark.other
        def test_other(): pass
        """,
    )
    return pytester


def names(result: pytest.RunResult) -> list[str]:
    """Tests that were collected, or that passed, by name."""
    return re.findall(r"::(test_\w+(?:\[\d+\])?)", result.stdout.str())


def test_the_option_selects_among_slow_tests_alone(suite):
    results = [suite.runpytest_inprocess("-v", "--slow-part", f"{part}/3") for part in (1, 2, 3)]
    parts = [names(result) for result in results]
    assert sorted(name for part in parts for name in part) == sorted(
        f"test_slow[{n}]" for n in range(20)
    )
    assert sorted(map(len, parts)) == [6, 7, 7]
    for number, (part, result) in enumerate(zip(parts, results, strict=True), 1):
        assert result.ret == 0
        result.assert_outcomes(passed=len(part), deselected=22 - len(part))
        assert f"slow tests, part {number}/3: {len(part)}" in result.stdout.str()
    assert names(suite.runpytest_inprocess("-v")) == ["test_plain", "test_other"]
    assert names(suite.runpytest_inprocess("-v", "-m", "other", "--slow-part", "1/1")) == []


def test_a_part_without_tests_is_said_and_no_failure(suite):
    result = suite.runpytest_inprocess("--slow-part", "2/7", "test_others.py")
    assert result.ret == 0
    assert "slow tests, part 2/7: there are none in it" in result.stdout.str()
    assert suite.runpytest_inprocess("-m", "slow", "test_others.py").ret == 5
    result = suite.runpytest_inprocess("--slow-part", "8/7")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "write K/N" in result.stderr.str()


def test_fast_cases_name_what_is_not_slow_and_must_be_cases(suite):
    """A slip in a name would make every case slow, and nobody would see it."""
    text = """
        import pytest
        @pytest.mark.parametrize("n", [1, 2])
        @pytest.mark.fast_cases("{}")
        def test_case(n): pass
        """
    suite.makepyfile(test_cases=text.format("2"))
    assert names(suite.runpytest_inprocess("-v", "test_cases.py")) == ["test_case[2]"]
    suite.makepyfile(test_cases=text.format("3"))
    result = suite.runpytest_inprocess("-v", "test_cases.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "fast_cases names no case: ['3']" in result.stdout.str() + result.stderr.str()
