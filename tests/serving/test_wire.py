"""openpi's message format: what goes in comes out, nothing but numbers travels, damage is named."""

import msgpack
import numpy as np
import pytest

from hooked_vla.serving.wire import WireError, pack, unpack

MESSAGES = [
    {"prompt": "lift", "n": 3, "ok": True, "none": None, "list": [1.5, {"a": b"bytes"}]},
    {"state": np.linspace(0, 1, 7), "image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3)},
    {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5), "mask": np.array([True, False])},
    {"one": np.float32(1.25), "whole": np.int64(-4), "truth": np.bool_(True)},
    {"strided": np.arange(12).reshape(3, 4).T[::2], "big-endian": np.arange(3, dtype=">i4")},
]


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, np.ndarray | np.generic):
        return first.dtype == second.dtype and first.shape == second.shape and np.array_equal(first, second)
    return first == second


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_survives_the_wire(message):
    assert same(message, unpack(pack(message)))


def test_received_arrays_may_be_changed():
    received = unpack(pack(np.zeros(3)))
    received[0] = 1
    assert received[0] == 1


@pytest.mark.parametrize("message", MESSAGES)
def test_openpis_own_codec_reads_and_writes_the_same_bytes(message):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy", reason="openpi-client is not installed")
    assert pack(message) == theirs.packb(message)
    assert same(message, unpack(theirs.packb(message)))
    assert same(message, theirs.unpackb(pack(message)))


@pytest.mark.parametrize("value", [np.array([{}]), np.array(["text"]), np.array([1j]), np.zeros(2, "i4,f8")])
def test_what_is_not_a_number_is_not_sent(value):
    with pytest.raises(WireError, match="refused"):
        pack(value)


def test_other_objects_are_not_sent():
    with pytest.raises(TypeError, match="not set"):
        pack({"a": {1, 2}})


def array(data: object = b"\0" * 8, dtype: object = "<f4", shape: object = (2,)) -> bytes:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array(dtype="|O"), "dtype object is refused"),
        (array(dtype="<U2"), "refused"),
        (array(dtype="no such"), "unknown dtype 'no such'"),
        (array(dtype=4), "dtype is a string"),
        (array(shape=(3,)), "has 12 bytes, got 8 bytes"),
        (array(shape=(-1, -2)), r"list of at most 8 sizes, got \[-1, -2\]"),
        (array(shape=(True, 2)), "sizes"),
        (array(shape=(1,) * 9 + (2,)), "at most 8 sizes"),
        (array(shape="ab"), "sizes, got 'ab'"),
        (array(shape=(2**40, 2**40)), "bytes, got 8 bytes"),
        (array(data="text"), "has 8 bytes, got str"),
        (msgpack.packb({b"__ndarray__": True}), "dtype is a string"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "a numpy number of type str"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "300 does not fit into uint8"),
        (b"\xc1", "1 bytes are not a msgpack message"),
        (b"", "0 bytes are not a msgpack message"),
        (pack({"state": np.zeros(9)})[:-3], "are not a msgpack message"),
        (pack(1) + b"\0", "are not a msgpack message: ExtraData"),
        (b"\x91" * 4000, "are not a msgpack message"),
    ],
)
def test_damage_is_named(data, message):
    with pytest.raises(WireError, match=message):
        unpack(data)
