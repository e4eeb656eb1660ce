"""Pickles of plain data are read whole; anything else is refused before it can do anything."""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from snapshots import A100_SNAPSHOT, written

from cs336_systems.errors import UserError
from cs336_systems.profiling.plain_pickle import References, load_plain

SHARED = [{"name": "f", "line": 1}, {"name": "g", "line": 2}]
PLAIN: list[Any] = [
    None,
    [True, False, 0, 255, 256, 65535, 65536, -1, 2**31, -(2**63), 2**200, 1.5, float("inf")],
    ("", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), "ü" * 300, "\ud800"),
    {"a": {"b": [[], {}, [[]]]}, 1: "x", (1, 2): None},
    list(range(5000)),
    {number: [number] for number in range(3000)},
    [SHARED, [SHARED[0]] * 3, [SHARED[1], SHARED[0]] * 800, [SHARED[1], SHARED[0]], [1, SHARED[0]], SHARED],
    ["text" * 40000, "text" * 40000],
]


def nothing(made: dict[Any, Any]) -> None:
    del made


def load(path: Path) -> Any:
    """The content with every reference resolved."""
    value, memo = load_plain(path, nothing)

    def resolved(found: Any) -> Any:
        if isinstance(found, References):
            return [resolved(memo[index]) for index in found.indices()]
        if isinstance(found, list | tuple):
            return type(found)(map(resolved, found))
        if isinstance(found, dict):
            return {resolved(key): resolved(held) for key, held in found.items()}
        return found

    return resolved(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("content", PLAIN, ids=range(len(PLAIN)))
def test_plain_data_of_every_binary_protocol_is_read_as_pickle_reads_it(
    tmp_path: Path, content: object, protocol: int
) -> None:
    assert load(written(tmp_path / "file", content, protocol)) == content


def test_a_real_snapshot_is_read_as_pickle_reads_it() -> None:
    """The standard library's own reader is the oracle; this file is known to be harmless."""
    assert load(A100_SNAPSHOT) == pickle.loads(A100_SNAPSHOT.read_bytes())


def test_what_a_dictionary_is_converted_to_takes_its_place_wherever_it_is_referred_to(tmp_path: Path) -> None:
    inner = {"number": 7, "name": "x"}
    path = written(tmp_path / "file", [inner, inner, {"inner": inner, "other": 1}])
    value, _ = load_plain(path, lambda made: made.get("number"))
    assert value == [7, 7, {"inner": 7, "other": 1}]


def test_equal_lists_of_references_are_one_object(tmp_path: Path) -> None:
    path = written(tmp_path / "file", [SHARED, *(list(SHARED) for _ in range(50))])
    value, _ = load_plain(path, nothing)
    assert len({id(found) for found in value[1:]}) == 1


# Refused -------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this runs a command when it is loaded without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_plain(path, nothing)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_names_a_function_is_refused_by_name_and_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path / "file", {"segments": [Runs(f"touch {tmp_path / 'was_run'}")]}, protocol)
    assert f"names '{os.system.__module__}.system'" in refusal(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (datetime.date(2026, 1, 1), "datetime.date"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        ({"a": {1, 2}}, ""),
        ([bytearray(b"x")], ""),
    ],
    ids=["date", "ordered", "set", "bytearray"],
)
def test_even_harmless_classes_are_refused(tmp_path: Path, content: object, named: str) -> None:
    assert named in refusal(written(tmp_path / "file", content))


@pytest.mark.parametrize(
    "program",
    [b"\x80\x02U\x01xQ.", b"\x80\x02\x82\x01.", b"\x80\x02(ios\nsystem\n.", b"\x80\x02Pname\n."],
    ids=["binpersid", "ext1", "inst", "persid"],
)
def test_the_rarer_ways_to_reach_code_are_refused_too(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(program)
    assert "refused" in refusal(path) or "no pickle of plain data" in refusal(path)


# Damaged -------------------------------------------------------------------------------------------------------


def test_wherever_a_pickle_is_cut_off_it_is_called_damaged(tmp_path: Path) -> None:
    whole = pickle.dumps(PLAIN[:4] + PLAIN[6:7], protocol=4)
    path = tmp_path / "file"
    for length in range(2, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in refusal(path)


def test_changed_bytes_end_in_an_error_for_the_user_or_in_other_plain_data(tmp_path: Path) -> None:
    whole = pickle.dumps(PLAIN[1:4] + PLAIN[6:7], protocol=4)
    path = tmp_path / "file"
    for place in range(0, len(whole), 31):
        for bits in (0x01, 0x40, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            with contextlib.suppress(UserError):
                load_plain(path, nothing)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (b"PK\x03\x04 an archive", "is not a pickle"), (b"(lp0\n.", "is not a pickle")],
    ids=["empty", "zip", "text protocol"],
)
def test_a_file_that_is_no_pickle_is_told_so(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert told in refusal(path)


def test_a_file_that_is_not_there_or_a_folder_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        load_plain(tmp_path / "missing", nothing)
    with pytest.raises(UserError, match="cannot read"):
        load_plain(tmp_path, nothing)


# Bombs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04" + b"]" * 5_000_000,
        b"\x80\x04" + b"(" * 9_000_000,
        b"\x80\x04" + b"N" * 10_000_000,
        b"\x80\x04N" + b"\x85" * 5_000_000,
        b"\x80\x04N" + b"\x94" * 9_000_000,
        b"\x80\x04]" + b"(" + b"NN" * 5_000_000 + b"e",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x",
        b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",
    ],
    ids=["lists", "marks", "values", "tuples", "memo", "entries", "long string", "far memo"],
)
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(program)
    refusal(path)


def test_a_list_that_holds_itself_is_nothing_to_follow(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    value, _ = load_plain(written(tmp_path / "file", endless), nothing)
    assert value[0] is value
