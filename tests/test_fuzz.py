"""Damaged input of 200 kinds ends in one clear line or a right result; `scripts/fuzz.py` runs thousands."""

import pytest
from damaged import Arena

COUNT, PARTS = 200, 8


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_input_is_refused_or_does_no_harm(arena, part):
    verdicts = [arena.run(seed) for seed in range(part, COUNT, PARTS)]
    assert [verdict for verdict in verdicts if verdict.fault] == []
    assert any(verdict.outcome == "refused" for verdict in verdicts)
