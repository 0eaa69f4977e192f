"""KServe v2's messages and tensors, held to NVIDIA's own client."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from forebay.api import BackendGarbage, BackendRefused, Inference, InferRequest
from forebay_plugins.kserve_infer import inference, message
from forebay_plugins.kserve_proto import MESSAGES
from forebay_plugins.kserve_tensors import flat, pack, unpack

BOUNDS = {
    **{f"INT{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32, 64)},
}
#: Bits of each floating type's numbers that are all kept.
WIDTHS = {"FP16": 16, "FP32": 32, "FP64": 64}


def values() -> st.SearchStrategy[tuple[str, list[Any]]]:
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "BOOL": st.booleans(),
        "BYTES": st.text(),
        **{name: st.integers(low, high) for name, (low, high) in BOUNDS.items()},
        **{name: st.floats(width=bits, allow_nan=False) for name, bits in WIDTHS.items()},  # type: ignore[arg-type]
    }
    return st.one_of(
        st.tuples(st.just(kind), st.lists(one, max_size=8)) for kind, one in kinds.items()
    )


@given(values())
def test_every_datatype_comes_back_as_it_went(tensor: tuple[str, list[Any]]) -> None:
    assert unpack(tensor[0], pack(*tensor)) == tensor[1]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest_there_is(value: float) -> None:
    data = pack("BF16", [value])
    (found,) = unpack("BF16", data)
    assert isinstance(found, float)
    assert pack("BF16", [found]) == data  # what is a BF16 stays it
    if math.isfinite(found):
        (bits,) = struct.unpack("<H", data)
        for near in (bits - 1, bits + 1):
            (other,) = unpack("BF16", struct.pack("<H", near & 0xFFFF))
            assert isinstance(other, float)
            if math.isfinite(other):
                assert abs(found - value) <= abs(other - value)


@given(st.lists(st.text()))
def test_texts_are_packed_as_nvidias_client_does(texts: list[str]) -> None:
    array = np.array([text.encode() for text in texts], dtype=np.object_)
    theirs = serialize_byte_tensor(array)
    assert pack("BYTES", texts) == (theirs.item() if theirs.size else b"")


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("UINT64", -1),
        ("INT32", 1.5),
        ("INT32", "1"),
        ("FP32", "1"),
        ("FP32", 1e300),
        ("FP16", 70000.0),
        ("BF16", None),
        ("BOOL", 1),
        ("BYTES", 1),
        ("INT4", 1),
    ],
)
def test_what_is_no_such_value(datatype: str, value: object) -> None:
    with pytest.raises(ValueError, match=datatype):
        pack(datatype, [value])


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT32", b"123"),
        ("BF16", b"1"),
        ("BYTES", b"\x05\x00\x00\x00abc"),
        ("BYTES", b"\x05"),
        ("BYTES", b"\x01\x00\x00\x00\xff"),
        ("INT4", b"1"),
    ],
)
def test_bytes_that_are_no_such_values(datatype: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(datatype, data)


def test_nested_and_flat_are_the_same() -> None:
    assert list(flat([[[1, 2], [3, 4]], 5])) == list(flat([1, 2, 3, 4, 5])) == [1, 2, 3, 4, 5]


def agree(ours: Any, theirs: Any) -> None:
    """By name, number and type: what is written as one is read as the other."""
    assert ours.GetOptions().map_entry == theirs.GetOptions().map_entry
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type) == (other.number, other.type)
        assert field.is_repeated == other.is_repeated
        if field.message_type:
            assert field.message_type.name == other.message_type.name
            agree(field.message_type, other.message_type)


def test_every_message_is_the_one_of_nvidias_client() -> None:
    whole = [name for name in MESSAGES if name.endswith(("Request", "Response"))]
    assert len(whole) == 15
    for name in whole:
        agree(MESSAGES[name].DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR)


def asking(body: object, tail: bytes = b"", **headers: str) -> InferRequest:
    head = json.dumps(body).encode()
    if tail:
        headers["inference-header-content-length"] = str(len(head))
    return InferRequest(
        id="1", model="m", created=1, body=head + tail, version="2", headers=headers
    )


X = {"name": "x", "datatype": "INT32", "shape": [1, 2]}


def test_a_request_with_all_that_json_can_say() -> None:
    body = {
        "id": "7",
        "parameters": {"priority": 3, "sequence_start": True, "big": 2**63, "p": 0.5, "s": "t"},
        "inputs": [
            {**X, "data": [[1, 2]]},
            {**X, "name": "y", "parameters": {"binary_data_size": 8}},
            {**X, "name": "z", "parameters": {"shared_memory_region": "r"}},
        ],
        "outputs": [
            {"name": "a", "parameters": {"binary_data": True, "classification": 2}},
            {"name": "b"},
        ],
    }
    made, binary = message(asking(body, b"12345678"), "model")
    read = service_pb2.ModelInferRequest.FromString(made.SerializeToString())
    assert (read.model_name, read.model_version, read.id) == ("model", "2", "7")
    assert read.parameters["priority"].int64_param == 3
    assert read.parameters["sequence_start"].bool_param is True
    assert read.parameters["big"].uint64_param == 2**63
    assert read.parameters["p"].double_param == 0.5
    assert read.parameters["s"].string_param == "t"
    assert [(one.name, list(one.shape), one.datatype) for one in read.inputs] == [
        (name, [1, 2], "INT32") for name in "xyz"
    ]
    assert list(read.raw_input_contents) == [struct.pack("<ii", 1, 2), b"12345678"]
    assert not read.inputs[1].parameters
    assert read.inputs[2].parameters["shared_memory_region"].string_param == "r"
    assert [one.name for one in read.outputs] == ["a", "b"]
    assert list(read.outputs[0].parameters) == ["classification"]
    assert binary == {"a"}


@pytest.mark.parametrize(
    ("request_", "field", "why"),
    [
        (asking({"inputs": [X]}), "inputs", "no `data`"),
        (asking({"inputs": [{**X, "data": [1]}]}), "inputs", "do not fill"),
        (asking({"inputs": [{**X, "data": [1, "a"]}]}), "inputs", "INT32"),
        (asking({"inputs": [{**X, "datatype": "?", "data": [1, 2]}]}), "inputs", "no datatype"),
        (
            asking({"inputs": [{**X, "parameters": {"binary_data_size": 8}}]}, b"1"),
            "inputs",
            "1 are left",
        ),
        (
            asking({"inputs": [{**X, "data": [1, 2]}]}, b"1"),
            "inference-header-content-length",
            "no input",
        ),
        (
            asking({"parameters": {"n": 2**64}, "inputs": []}),
            "parameters",
            "out of range",
        ),
        (asking({"inputs": [{"name": "x"}]}), None, "datatype"),
        (asking({}, **{"content-encoding": "gzip"}), "content-encoding", "compressed"),
    ],
)
def test_a_request_that_is_none(request_: InferRequest, field: str | None, why: str) -> None:
    with pytest.raises(BackendRefused, match=why) as raised:
        message(request_, "m")
    assert raised.value.param == field


def answered() -> Any:
    made = service_pb2.ModelInferResponse(model_name="m", model_version="2", id="7")
    made.parameters["p"].int64_param = 3
    made.outputs.add(name="a", datatype="FP32", shape=[1, 2])
    made.outputs.add(name="b", datatype="BYTES", shape=[1])
    made.raw_output_contents.extend([struct.pack("<ff", 0.5, 1), b"\x01\x00\x00\x00x"])
    return made


def read(found: Inference) -> tuple[Any, bytes]:
    length = int(found.headers.get("inference-header-content-length", len(found.body)))
    return json.loads(found.body[:length]), found.body[length:]


def test_an_answer_in_json_in_binary_and_in_both() -> None:
    common = {"model_name": "m", "model_version": "2", "id": "7", "parameters": {"p": 3}}
    a = {"name": "a", "datatype": "FP32", "shape": [1, 2]}
    b = {"name": "b", "datatype": "BYTES", "shape": [1]}
    plain = inference(answered(), frozenset())
    assert plain.content_type == "application/json"
    outputs = [{**a, "data": [0.5, 1.0]}, {**b, "data": ["x"]}]
    assert read(plain) == ({**common, "outputs": outputs}, b"")
    binary = inference(answered(), None)
    assert binary.content_type == "application/octet-stream"
    outputs = [{**a, "parameters": {"binary_data_size": 8}}]
    outputs += [{**b, "parameters": {"binary_data_size": 5}}]
    tail = struct.pack("<ff", 0.5, 1) + b"\x01\x00\x00\x00x"
    assert read(binary) == ({**common, "outputs": outputs}, tail)
    mixed = inference(answered(), frozenset({"b"}))
    outputs[0] = {**a, "data": [0.5, 1.0]}
    assert read(mixed) == ({**common, "outputs": outputs}, tail[8:])


def test_an_answer_that_is_none() -> None:
    made = answered()
    del made.raw_output_contents[1]
    with pytest.raises(BackendGarbage, match="lacks"):
        inference(made, None)
    made = answered()
    made.raw_output_contents[1] = b"\x01\x00\x00\x00\xff"
    with pytest.raises(BackendGarbage, match="ask for it in binary"):
        inference(made, frozenset())
    assert inference(made, frozenset({"b"})).body.endswith(b"\xff")
