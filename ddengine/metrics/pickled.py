"""Plain data out of a pickle that nobody need trust: numbers, text, lists, tuples, dictionaries and NumPy arrays.

A pickle is a program. Here no callable it names is ever looked up, imported or called: its opcodes are read one by one
(`pickletools`), those that build plain data are carried out, and the three call patterns by which NumPy writes an array
are recognised and answered with `np.frombuffer`. Everything else is refused.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddengine.errors import InputError

MAX_BYTES = 64 << 20  # a mask of 8 megapixels as float64; the published pickles here hold under half a megabyte
MAX_STEPS = 1_000_000  # opcodes; a published pickle has about a hundred
MAX_ARRAYS = 16  # one stretch of bytes can be the content of many arrays
MAX_DEPTH = 32  # containers in containers; published ones lie three deep
MAX_NODES = 1_000_000  # values, those that are shared counted wherever they are met: few opcodes can share up billions

_DTYPE = re.compile(r"b1|u[1248]|i[1248]|f[248]")
_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_FROM_BUFFER = {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
_NDARRAY, _NUMPY_DTYPE = ("numpy", "ndarray"), ("numpy", "dtype")

_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """The plain data in a pickle file; InputError for anything more than that, and for files over MAX_BYTES."""
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; check the path") from error
    return parse_pickle(data, name)


def parse_pickle(data: bytes, name: str = "the pickle") -> Any:
    """`read_pickle` of bytes: None, bool, int, float, str, bytes, list, tuple, dict, and arrays of numbers.

    Protocols 2 to 5 for containers, 3 to 5 for arrays. Nothing the pickle names is run. Raises InputError.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than the limit of {MAX_BYTES} bytes; it is no description of drags")
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step >= MAX_STEPS:
                raise _Refused(f"it has more than {MAX_STEPS} operations")
            machine.run(opcode.name, argument)
        if len(machine.stack) != 1 or machine.marks or _special(machine.stack[0]):
            raise _Refused("it does not end in one value")
        _check_extent(machine.stack[0])
    except _Refused as refusal:
        raise InputError(
            f"{name} is not read: {refusal}; only plain containers and NumPy arrays of numbers are, for a pickle can "
            f"run code: save it as such"
        ) from None
    # What a reader of damaged bytes meets: a missing mark, memo or operand, a key that is a list.
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        what = type(error).__name__ if isinstance(error, (KeyError, IndexError)) else str(error)[:200]
        raise InputError(f"{name} is damaged ({what}); fetch it again") from error
    return machine.stack[0]


class _Refused(Exception):
    """Why a pickle is more than plain data."""


class _Name(NamedTuple):
    """A name the pickle asked for; a name is all it stays."""

    module: str
    name: str


class _Arguments(tuple[Any, ...]):
    """A tuple with a name, a type or an unfilled array in it: arguments of a call, no value."""

    __slots__ = ()


class _Type:
    """A dtype on its way: its code, then, from its state, its byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, ""


class _Blank:
    """An array whose content is still to come, and the memo's keys for it."""

    def __init__(self) -> None:
        self.keys: list[int] = []


def _special(value: Any) -> bool:
    return isinstance(value, (_Name, _Arguments, _Type, _Blank))


def _check_extent(value: Any) -> None:
    """Refuse what would take whoever walks through it too deep or too long, be it by sharing or by going in circles.

    Nothing here recurses, nor hashes, compares or prints a container: that alone ends a process that is deep enough.
    """
    met, left = 1, [(value, 1)]
    while left:
        node, depth = left.pop()
        if not isinstance(node, (list, tuple, dict)):
            continue
        if depth > MAX_DEPTH:
            raise _Refused(f"its containers lie more than {MAX_DEPTH} deep")
        met += len(node)
        if met > MAX_NODES:
            raise _Refused(f"it has more than {MAX_NODES} values")
        left.extend((part, depth + 1) for part in (node.values() if isinstance(node, dict) else node))


def _is_key(value: Any) -> bool:
    """Whether a dictionary may have it as a key: hashed at once, which takes tuples as deep as they are."""
    return (
        value is None
        or isinstance(value, (str, bytes, float))
        or (isinstance(value, int) and -(1 << 63) <= value < 1 << 64)
    )


class _Machine:
    """The stack, its marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.arrays = 0

    def run(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self.stack
        if opcode in _VALUES:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("PROTO", "FRAME", "STOP"):
            pass
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode in _TUPLES:
            self.tuple_of([stack.pop() for _ in range(_TUPLES[opcode])][::-1])
        elif opcode == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif opcode == "TUPLE":
            self.tuple_of(self.to_mark())
        elif opcode in ("APPEND", "APPENDS"):
            items = [stack.pop()] if opcode == "APPEND" else self.to_mark()
            self.container(list).extend(self.plain(items))
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if opcode == "SETITEM" else self.to_mark()
            if not all(map(_is_key, items[::2])):
                raise _Refused("a key of a dictionary is neither text nor a number of 64 bits")
            self.container(dict).update(zip(*[iter(self.plain(items))] * 2, strict=True))
        elif opcode in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            key = len(self.memo) if opcode == "MEMOIZE" else argument
            self.memo[key] = stack[-1]
            if isinstance(stack[-1], _Blank):
                stack[-1].keys.append(key)
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode == "GLOBAL":
            stack.append(self.named(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.named(module, name))
        elif opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            self.build(state)
        else:
            raise _Refused(f"it uses {opcode}")

    def to_mark(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, items: list[Any]) -> None:
        self.stack.append(_Arguments(items) if any(map(_special, items)) else tuple(items))

    def container(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"it fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    @staticmethod
    def plain(items: list[Any]) -> list[Any]:
        if any(map(_special, items)):
            raise _Refused("it stores a function, a type or half an array as a value")
        return items

    @staticmethod
    def named(module: Any, name: Any) -> _Name:
        if type(module) is not str or type(name) is not str:  # before anything hashes them
            raise _Refused("it names no text")
        if (module, name) in {*_RECONSTRUCT, *_FROM_BUFFER, _NDARRAY, _NUMPY_DTYPE}:
            return _Name(module, name)
        raise _Refused(f"it names {module[:40]}.{name[:40]}")

    def call(self, function: Any, arguments: Any) -> Any:
        """What NumPy's own three calls give; the function is compared, never called."""
        if type(function) is not _Name:  # before anything hashes it
            raise _Refused("it makes a call")
        match arguments:
            case (_Name() as kind, (0,), b"b") if function in _RECONSTRUCT and kind == _NDARRAY:
                return _Blank()
            case (str(code), False, True) if function == _NUMPY_DTYPE:
                if not _DTYPE.fullmatch(code):
                    raise _Refused(f"it holds an array of dtype {code[:20]!r}")
                return _Type(code)
            case (bytes(content), _Type() as kind, tuple(shape), "C" | "F" as order) if function in _FROM_BUFFER:
                return self.array(content, kind, shape, order)
        raise _Refused("it makes a call")

    def build(self, state: Any) -> None:
        """Give a dtype its byte order, an array its content."""
        top = self.stack[-1]
        match top, state:
            case _Type(), (3, "|" | "<" | ">" as order, None, None, None, -1, -1, 0):
                top.order = order
            case _Blank(), (1, tuple(shape), _Type() as kind, bool(fortran), bytes(content)):
                self.stack[-1] = self.array(content, kind, shape, "F" if fortran else "C")
                for key in top.keys:
                    self.memo[key] = self.stack[-1]
            case _:
                raise _Refused("it sets the state of an object")

    def array(self, content: bytes, kind: _Type, shape: tuple[Any, ...], order: Any) -> NDArray[Any]:
        self.arrays += 1
        if self.arrays > MAX_ARRAYS:
            raise _Refused(f"it holds more than {MAX_ARRAYS} arrays")
        if len(shape) > 8 or not all(type(side) is int and 0 <= side <= MAX_BYTES for side in shape):
            raise _Refused("it holds an array of no possible shape")
        if math.prod(max(side, 1) for side in shape) > MAX_BYTES:  # an empty one, that would be endless lists
            raise _Refused("it holds an array of no possible shape")
        dtype = np.dtype("u1" if kind.code == "b1" else kind.order + kind.code)
        if math.prod(shape) * dtype.itemsize != len(content):
            raise _Refused(f"it holds {len(content)} bytes for an array of shape {shape} and dtype {kind.code}")
        values: NDArray[Any] = np.frombuffer(content, dtype).reshape(shape, order=order)
        return values != 0 if kind.code == "b1" else values  # a byte that is neither 0 nor 1 is no bool to NumPy
