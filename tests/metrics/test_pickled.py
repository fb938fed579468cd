"""Pickles as data: what NumPy and plain Python write comes back; what does anything else is refused unread."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ddengine.errors import InputError
from ddengine.metrics import pickled
from ddengine.metrics.pickled import parse_pickle, read_pickle

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner, inner, inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(), inner, max_size=5)
    ),
    max_leaves=12,
)
DTYPES = (
    hnp.boolean_dtypes()
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
)


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_comes_back(value: Any, protocol: int) -> None:
    assert parse_pickle(pickle.dumps(value, protocol)) == value


@settings(max_examples=50)
@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)), st.sampled_from([3, 4, 5]))
def test_arrays_come_back(array: np.ndarray, protocol: int) -> None:
    for written in (array, np.asfortranarray(array), array.T):
        twice = parse_pickle(pickle.dumps({"a": written, "b": [written]}, protocol))
        assert twice["a"] is twice["b"][0]
        assert twice["a"].dtype == written.dtype
        np.testing.assert_array_equal(twice["a"], written)


def test_what_two_numpys_call_their_functions_is_known() -> None:
    for protocol in (3, 4, 5):
        data = pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3), protocol)
        for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
            renamed = data
            for module in (b"multiarray", b"numeric"):  # SHORT_BINUNICODE has its length before it, GLOBAL needs none
                one, other = old + module, new + module
                renamed = renamed.replace(bytes([len(one)]) + one, bytes([len(other)]) + other).replace(one, other)
            np.testing.assert_array_equal(parse_pickle(renamed), [[0, 1, 2], [3, 4, 5]])


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


TRAP: list[str] = []


def spring(*_: Any) -> dict[str, Any]:
    TRAP.append("sprung")
    return {}


def hostile() -> dict[str, bytes]:
    objects = np.array([Calls(spring, ())], dtype=object)
    array = pickle.dumps(np.zeros(4, np.uint8), 4)
    return {
        "a call": pickle.dumps(Calls(spring, (1,))),
        "a call inside the expected dictionary": pickle.dumps({"prompt": Calls(spring, ()), "points": [[1, 2]]}),
        "a call as a key": pickle.dumps({Calls(spring, ()): 1}),
        "a shell": pickle.dumps(Calls(os.system, ("exit 0",))),
        "a builtin": pickle.dumps(Calls(eval, ("1",))),
        "protocol 0": b"cos\nsystem\n(S'exit 0'\ntR.",
        "protocol 1": pickle.dumps(Calls(spring, ()), 1),
        "INST": b"(S'exit 0'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'exit 0'\no.",
        "an instance": pickle.dumps(Path("x")),
        "a subclass of dict": pickle.dumps(OrderedDict(a=1)),
        "a class as a value": pickle.dumps({"a": np.ndarray}),
        "a dtype as a value": pickle.dumps([np.dtype("u1")]),
        "a dtype in a tuple": pickle.dumps(((np.dtype("u1"),), 1)),
        "a scalar of NumPy": pickle.dumps(np.float64(1)),
        "an array of objects": pickle.dumps(objects),
        "a structured array": pickle.dumps(np.zeros(2, [("a", "u1")])),
        "an array of text": pickle.dumps(np.array(["a"])),
        "a subclass of ndarray": pickle.dumps(np.ma.masked_array([1, 2], [0, 1])),
        "numpy's loader": b"cnumpy\nload\n.",
        "a name that numpy re-exports": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        "state for a dictionary": b"\x80\x04}}b.",
        "state of another shape": array.replace(b"K\x04\x85", b"K\x05\x85"),
        "a negative shape": array.replace(b"K\x04\x85", b"J\xfc\xff\xff\xff\x85"),
        "half an array": array[: array.index(b"(K\x01K\x04")] + b".",
        "a persistent id": b"\x80\x04\x8c\x01aQ.",
        "the extension registry": b"\x80\x02\x82\x01.",
        "a buffer from outside": b"\x80\x05\x97.",
        "a list filled as a dictionary": b"\x80\x04]K\x01K\x02s.",
        "an array filled as a list": array[:-1] + b"K\x01a.",
        "two values": b"\x80\x04K\x01K\x02.",
        "no value": b"\x80\x04.",
        "an open mark": b"\x80\x04(K\x01.",
        "a missing memo": b"\x80\x04h\x07.",
        "a list as a key": b"\x80\x04}]K\x01s.",
        "a dictionary of odd length": b"\x80\x04}(K\x01u.",
        "a length beyond the file": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "nothing": b"",
        "no pickle": b"GIF89a",
    }


@pytest.mark.parametrize("kind", hostile())
def test_anything_else_is_refused_and_nothing_runs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "meta_data.pkl"
    path.write_bytes(hostile()[kind])
    with pytest.raises(InputError, match=r"meta_data\.pkl is (not read|damaged)"):
        read_pickle(path)
    assert TRAP == []


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple: to hash, to compare or to print it ends a process


def points(value: bytes, filler: bytes = b"K\x01") -> bytes:
    """A sample's description whose first drag is `value` and a filler."""
    return b"\x80\x04}(\x8c\x06prompt\x8c\x01a\x8c\x06points](" + value + filler + b"eu."


def shared(times: int, depth: int) -> bytes:
    """A tuple of so many times one tuple of so many times one tuple ..., as deep as said."""
    value = b")"
    for level in range(depth):
        value = b"(" + value + b"\x94" + (b"h" + bytes([level])) * (times - 1) + b"t"
    return value


def endless() -> dict[str, bytes]:
    """What ends the process, or never ends itself, when somebody hashes it, prints it or walks through it."""
    name = b"\x8c\x05numpy\x8c\x07ndarray\x93"
    empty = pickle.dumps({"prompt": "a", "points": [np.zeros((0, 2)), 1]}, 4)
    assert empty.count(b"K\x00K\x02\x86") == 1
    digits = (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000
    return {
        "a deep tuple as a key": b"\x80\x04}" + DEEP + b"K\x01s.",
        "a deep tuple as one of several keys": b"\x80\x04}(K\x01K\x02" + DEEP + b"K\x01u.",
        "a deep tuple as a name": b"\x80\x04\x8c\x05numpy" + DEEP + b"\x93.",
        "a deep tuple as a module": b"\x80\x04" + DEEP + b"\x8c\x07ndarray\x93.",
        "a deep tuple that is called": b"\x80\x04" + DEEP + name + b"K\x00\x85C\x01b\x87R.",
        "a key of millions of digits": b"\x80\x04}\x8b" + digits + b"K\x01s.",
        "nothing but a deep tuple": b"\x80\x04" + DEEP + b".",
        "a deep point": points(DEEP),
        "a deep list for a point": points(b"]" * 100_000 + b"a" * 99_999),
        "a point a few hundred deep": points(b"]" * 500 + b"a" * 499),
        "a deep number": points(b"K\x01" + DEEP + b"\x86"),
        "a point that doubles sixty times": points(shared(2, 60)),
        "a point of shared tuples of shared tuples": points(shared(250, 5)),
        "a point that holds itself": points(b"]\x94h\x00a"),
        "an empty array of endless lists": empty.replace(
            b"K\x00K\x02\x86", b"J\x00\x00\x00\x04J\x00\x00\x00\x04K\x00\x87"
        ),
    }


def test_what_is_too_deep_or_without_end_costs_its_own_sample(tmp_path: Path) -> None:
    """In a process of its own, which it would end: every such sample is refused, and the one after it is read."""
    kinds = endless()
    for number, content in enumerate([*kinds.values(), pickle.dumps({"points": [(1, 2), (3, 4)]})]):
        folder = tmp_path / "kind" / f"{number:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "original_image.png")
        (folder / "meta_data.pkl").write_bytes(content)
    script = (
        "import json, sys; from ddengine.metrics.datasets import read_set; samples, refused = read_set(sys.argv[1]); "
        "print(json.dumps([[sample.name for sample in samples], refused]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    read, refused = json.loads(done.stdout)
    assert read == [f"kind/{len(kinds):02d}"]
    said = {kind: refused[f"kind/{number:02d}"] for number, kind in enumerate(kinds)}
    assert [kind for kind, why in said.items() if "meta_data.pkl is not read" not in why] == []
    assert "32 deep" in said["a deep point"] and "1000000 values" in said["a point of shared tuples of shared tuples"]


def test_depth_and_values_are_counted_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = 1
    for _ in range(pickled.MAX_DEPTH):
        deep = [deep]
    assert parse_pickle(pickle.dumps(deep)) == deep
    with pytest.raises(InputError, match="more than 32 deep"):
        parse_pickle(pickle.dumps({"a": deep}))
    monkeypatch.setattr(pickled, "MAX_NODES", 21)
    one = [1, 2, 3, 4]
    assert parse_pickle(pickle.dumps([one] * 4)) == [one] * 4  # 1 + 4 + 16: shared ones count wherever they are
    with pytest.raises(InputError, match="more than 21 values"):
        parse_pickle(pickle.dumps([[*one, 5], *[one] * 3]))
    for key in (None, True, 2**64 - 1, -(2**63), 0.5, "a", b"a"):
        assert parse_pickle(pickle.dumps({key: 1})) == {key: 1}
    for key in (2**64, -(2**63) - 1, (1,)):
        with pytest.raises(InputError, match="neither text nor a number of 64 bits"):
            parse_pickle(pickle.dumps({key: 1}))


def test_the_trap_is_live() -> None:
    """Else the test above could not fail."""
    assert pickle.loads(hostile()["a call"]) == {} and TRAP == ["sprung"]
    TRAP.clear()


@given(st.data())
def test_damage_is_refused_or_gives_plain_data(data: st.DataObject) -> None:
    """Every opcode at every place, so to speak: whatever bytes change, an InputError or plain data comes of it."""
    whole = bytearray(pickle.dumps({"prompt": "a cat", "points": [[1, 2], (3, 4)], "mask": np.eye(3)}, 4))
    opcodes = st.sampled_from([ord(opcode.code) for opcode in pickletools.opcodes]) | st.integers(0, 255)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
        whole[place] = data.draw(opcodes)
    with contextlib.suppress(InputError):
        assert_plain(parse_pickle(bytes(whole)), 20)


def assert_plain(value: Any, depth: int) -> None:
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "biuf"
        return
    assert type(value) in (type(None), bool, int, float, str, bytes, list, tuple, dict)
    if depth and isinstance(value, (list, tuple, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            assert_plain(part, depth - 1)


def test_size_steps_and_arrays_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_STEPS", 50)
    assert parse_pickle(b"\x80\x04K\x01.") == 1
    with pytest.raises(InputError, match="more than 50 operations"):
        parse_pickle(b"\x80\x04](" + b"K\x01" * 100 + b"e.")
    monkeypatch.setattr(pickled, "MAX_STEPS", 10_000)
    with pytest.raises(InputError, match="more than 16 arrays"):
        parse_pickle(pickle.dumps([np.zeros(1) for _ in range(17)], 4))
    monkeypatch.setattr(pickled, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="limit of 10 bytes"):
        parse_pickle(pickle.dumps(list(range(20))))


def test_published_files_are_read(photographs: list[Path]) -> None:
    for folder in photographs[:4]:
        found, trusted = read_pickle(folder / "meta_data.pkl"), pickle.loads((folder / "meta_data.pkl").read_bytes())
        np.testing.assert_array_equal(found.pop("mask"), trusted.pop("mask"))
        assert found == trusted
