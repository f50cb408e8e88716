"""Every call to the system that a save makes fails once: the old model stands, or the new one."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.faults import COMPILER, failing_saves

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler, and a loader that preloads"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return failing_saves(tmp_path_factory.mktemp("faults"))


def test_either_model_stands_with_the_notes_beside_it(found):
    assert len(found["faults"]) > 30
    assert {fault["notes"] for fault in found["faults"]} == {"mine"}
    assert found["left"] == []  # and what faults in clearing up have left, the next save clears up


def test_each_kind_of_call_failed_and_was_told_before_the_exchange(found):
    faults = found["faults"]
    assert {"fsync", "write", "renameat2"} <= {fault["failed"] for fault in faults}
    for fault in faults:
        if fault["after"] == fault["before"]:
            assert fault["raised"], fault  # who saved knows that it was for nothing
