"""The messages of KServe v2 over gRPC, with Triton's extensions, as far as they are needed here.

Names and numbers are those of `grpc_service.proto` and `model_config.proto` in
triton-inference-server/common, whose classes tritonclient has as well: importing those brings numpy
and more, 25 MB against 11 MB for these, and holds protobuf to one major version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

__all__ = ["MESSAGES", "SERVICE"]

SERVICE = "inference.GRPCInferenceService"

#: Of each message its fields: name, type and number; `*` many, `%` a map from strings, `?` one of.
_FIELDS = {
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool=1",
    "ModelReadyRequest": "name:string=1 version:string=2",
    "ModelReadyResponse": "ready:bool=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string=1 version:string=2",
    "TensorMetadata": "name:string=1 datatype:string=2 shape:int64*=3",
    "ModelMetadataRequest": "name:string=1 version:string=2",
    "ModelMetadataResponse": "name:string=1 inputs:TensorMetadata*=4 outputs:TensorMetadata*=5",
    "ModelTransactionPolicy": "decoupled:bool=1",
    "ModelConfig": "max_batch_size:int32=4 model_transaction_policy:ModelTransactionPolicy=19",
    "ModelConfigRequest": "name:string=1 version:string=2",
    "ModelConfigResponse": "config:ModelConfig=1",
    "ModelIndex": "name:string=1 version:string=2 state:string=3",
    "RepositoryIndexRequest": "repository_name:string=1 ready:bool=2",
    "RepositoryIndexResponse": "models:ModelIndex*=1",
    "InferParameter": "bool_param:bool?=1 int64_param:int64?=2 string_param:string?=3 "
    "double_param:double?=4 uint64_param:uint64?=5",
    "InferInputTensor": "name:string=1 datatype:string=2 shape:int64*=3 "
    "parameters:InferParameter%=4",
    "InferRequestedOutputTensor": "name:string=1 parameters:InferParameter%=2",
    "InferOutputTensor": "name:string=1 datatype:string=2 shape:int64*=3 "
    "parameters:InferParameter%=4",
    "ModelInferRequest": "model_name:string=1 model_version:string=2 id:string=3 "
    "parameters:InferParameter%=4 inputs:InferInputTensor*=5 "
    "outputs:InferRequestedOutputTensor*=6 raw_input_contents:bytes*=7",
    "ModelInferResponse": "model_name:string=1 model_version:string=2 id:string=3 "
    "parameters:InferParameter%=4 outputs:InferOutputTensor*=5 raw_output_contents:bytes*=6",
    "ModelStreamInferResponse": "error_message:string=1 infer_response:ModelInferResponse=2",
}
_KINDS = {
    "repeated": FieldDescriptorProto.LABEL_REPEATED,
    "one": FieldDescriptorProto.LABEL_OPTIONAL,
}


def _add(message: DescriptorProto, name: str, kind: str, number: int, many: bool = False) -> Any:
    field = message.field.add(name=name, number=number, label=_KINDS["repeated" if many else "one"])
    if kind in _FIELDS or "." in kind:
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".inference.{kind}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    return field


def _described(name: str, fields: str) -> DescriptorProto:
    message = DescriptorProto(name=name)
    for text in fields.split():
        field, rest = text.split(":")
        kind, number = rest.split("=")
        plain = kind.rstrip("*%?")
        if kind.endswith("%"):
            entry = message.nested_type.add(name=f"{field.title()}Entry")
            entry.options.map_entry = True
            _add(entry, "key", "string", 1)
            _add(entry, "value", plain, 2)
            plain = f"{name}.{entry.name}"
        made = _add(message, field, plain, int(number), many=kind[-1] in "*%")
        if kind.endswith("?"):
            if not message.oneof_decl:
                message.oneof_decl.add(name="parameter_choice")
            made.oneof_index = 0
    return message


def _messages() -> Mapping[str, Any]:
    file = FileDescriptorProto(name="kserve.proto", package="inference", syntax="proto3")
    file.message_type.extend(_described(name, fields) for name, fields in _FIELDS.items())
    pool = DescriptorPool()  # of our own: tritonclient's classes may be loaded beside these
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"inference.{name}") for name in _FIELDS}
    return {name: GetMessageClass(descriptor) for name, descriptor in found.items()}


#: The classes by their names.
MESSAGES = _messages()
