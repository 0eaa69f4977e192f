"""KServe v2 inference from HTTP's JSON to gRPC's messages, and back again.

A body is JSON, or JSON with the tensors in binary behind it; the header tells how long the JSON is.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from forebay.api import BackendGarbage, BackendRefused, Inference, InferRequest
from forebay_plugins.kserve import JSON_LENGTH
from forebay_plugins.kserve_proto import MESSAGES
from forebay_plugins.kserve_tensors import flat, pack, unpack

__all__ = ["inference", "message", "set_parameter"]

Parameter = bool | int | float | str


class Input(Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] = {}
    data: Any = UNSET


class Output(Struct):
    name: str
    parameters: dict[str, Parameter] = {}


class Body(Struct):
    inputs: list[Input]
    outputs: list[Output] = []
    id: str = ""
    parameters: dict[str, Parameter] = {}


class Answered(Struct, omit_defaults=True):
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] = {}
    data: list[object] | UnsetType = UNSET


class Answer(Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[Answered]
    id: str = ""
    parameters: dict[str, Parameter] = {}


def message(request: InferRequest, model: str) -> tuple[Any, frozenset[str] | None]:
    """The `ModelInferRequest`, and the outputs that are wanted in binary; None: all of them.

    :raises BackendRefused: naming the field that is at fault.
    """
    if "content-encoding" in request.headers:
        raise BackendRefused(
            "the backend is reached by gRPC and takes no compressed body", param="content-encoding"
        )
    length = int(request.headers.get(JSON_LENGTH, len(request.body)))
    try:
        body = msgspec.json.decode(request.body[:length], type=Body)
    except msgspec.ValidationError as wrong:
        raise BackendRefused(str(wrong)) from None
    made = MESSAGES["ModelInferRequest"](
        model_name=model, model_version=request.version, id=body.id
    )
    all_binary = body.parameters.pop("binary_data_output", False) is True
    set_parameters(made, body.parameters)
    _add_inputs(made, body.inputs, request.body[length:])
    binary = set()
    for output in body.outputs:
        if output.parameters.pop("binary_data", all_binary):
            binary.add(output.name)
        set_parameters(made.outputs.add(name=output.name), output.parameters)
    return made, None if all_binary and not body.outputs else frozenset(binary)


def _add_inputs(made: Any, inputs: list[Input], rest: bytes) -> None:
    for tensor in inputs:
        size = tensor.parameters.pop("binary_data_size", None)
        if size is not None:
            if not isinstance(size, int) or not 0 <= size <= len(rest):
                raise _wrong(tensor, f"has a `binary_data_size` of {size}, {len(rest)} are left")
            made.raw_input_contents.append(rest[:size])
            rest = rest[size:]
        elif tensor.data is not UNSET:
            made.raw_input_contents.append(_packed(tensor))
        elif "shared_memory_region" not in tensor.parameters:
            raise _wrong(tensor, "has no `data`")
        to = made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        set_parameters(to, tensor.parameters)
    if rest:
        raise BackendRefused(
            f"{len(rest)} bytes behind the JSON belong to no input", param=JSON_LENGTH
        )


def _packed(tensor: Input) -> bytes:
    values = list(flat(tensor.data))
    if len(values) != prod(tensor.shape):
        raise _wrong(tensor, f"has {len(values)} values, which do not fill {tensor.shape}")
    try:
        return pack(tensor.datatype, values)
    except ValueError as wrong:
        raise _wrong(tensor, f"cannot be sent: {wrong}") from None


def _wrong(tensor: Input, why: str) -> BackendRefused:
    return BackendRefused(f"input {tensor.name!r} {why}", param="inputs")


def set_parameters(to: Any, parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        set_parameter(to, name, value)


def set_parameter(to: Any, name: str, value: Parameter) -> None:
    """
    :raises BackendRefused: a number is too large.
    """
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    kind = kinds[type(value)]
    if kind == "int64_param" and isinstance(value, int) and value >= 1 << 63:
        kind = "uint64_param"
    try:
        setattr(to.parameters[name], kind, value)
    except ValueError:
        raise BackendRefused(f"parameter {name!r} is out of range", param="parameters") from None


def inference(answer: Any, binary: frozenset[str] | None) -> Inference:
    """The answer as HTTP would have it.

    :raises BackendGarbage: its tensors are not what it says of them.
    """
    if len(answer.outputs) != len(answer.raw_output_contents):
        raise BackendGarbage("the backend's answer lacks the contents of a tensor")
    outputs, tail = [], []
    for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
        shown = Answered(output.name, output.datatype, list(output.shape), parameters_of(output))
        outputs.append(shown)
        if binary is None or output.name in binary:
            shown.parameters["binary_data_size"] = len(content)
            tail.append(content)
            continue
        try:
            shown.data = unpack(output.datatype, content)
        except ValueError as wrong:
            raise BackendGarbage(
                f"output {output.name!r} has no form in JSON ({wrong}); ask for it in binary"
            ) from None
    head = msgspec.json.encode(
        Answer(answer.model_name, answer.model_version, outputs, answer.id, parameters_of(answer))
    )
    if not tail:
        return Inference(head)
    headers = {JSON_LENGTH: str(len(head))}
    return Inference(head + b"".join(tail), "application/octet-stream", headers)


def parameters_of(of: Any) -> dict[str, Parameter]:
    found = {}
    for name, value in of.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind:
            found[name] = getattr(value, kind)
    return found
