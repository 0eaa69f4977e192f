"""GGUF files as models: as the folder that the engine reads, or turned into one of safetensors.

What a file says of the model, its tokenizer and its chat template is written once into a small
folder beside a link to it; the weights are read from the file itself.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forebay_engine.gguf_config import model_config
from forebay_engine.gguf_file import MODEL_FILE, GgufFile, GgufTensor
from forebay_engine.gguf_names import is_weight, less_one, tensor_name
from forebay_engine.gguf_tokenizer import write_tokenizer
from forebay_engine.hf_config import ModelError

#: Told of (what is done now, how much is done, of how much).
Progress = Callable[[str, int, int], None]

WEIGHTS = "model.safetensors"

#: Counted up when a file would be written down otherwise than before.
_EDITION = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_folder(path: Path) -> Path:
    """The model folder for ``path``: itself, or one made of the GGUF file that it is or holds.

    A tokenizer.json beside the file is taken in place of its own tokenizer. Made once, under
    ``$XDG_CACHE_HOME/forebay/gguf``; a file that has changed makes another.

    :raises ModelError: several GGUF files in a folder, or one of a kind that is not supported.
    """
    source = _find(path.expanduser())
    if source is None:
        return path
    beside = [source.parent / name for name in _TOKENIZER_FILES]
    parts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
             for file in [source, *beside] if file.exists()]  # fmt: skip
    key = sha256(repr((_EDITION, parts)).encode()).hexdigest()[:16]
    cache = _cache()
    folder = cache / f"{source.stem}-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            _describe(source, Path(partial) / "new")
            _settle(Path(partial) / "new", folder)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "forebay/gguf"


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ModelError(f"{path} holds several GGUF files ({names}); name one of them")
    return found[0] if found else None


def _settle(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise


def _describe(source: Path, folder: Path) -> None:
    """Write config.json and the tokenizer's files, and link the weights."""
    file = GgufFile(source)
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config_of(file))
    if (source.parent / "tokenizer.json").is_file():
        for name in _TOKENIZER_FILES:
            if (source.parent / name).is_file():
                shutil.copy(source.parent / name, folder / name)
    else:
        _write_tokenizer(file, folder)
    (folder / MODEL_FILE).symlink_to(source.resolve())


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    try:
        write_tokenizer(file.metadata, folder)
    except KeyError as error:
        raise ModelError(
            f"{file.path}: the metadata lack {error}; put the model's tokenizer.json beside it"
        ) from error


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json's keys.

    :raises ModelError: with the file's name, what is not supported.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {
        name: tensor.values(slice(None)).flatten().tolist()
        for name, tensor in file.tensors.items()
        if not is_weight(name)
    }
    try:
        return model_config(file.metadata, shapes, factors)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from error


def convert(source: Path, folder: Path, progress: Progress) -> str:
    """Write a Gemma 3 file as a Hugging Face folder; the SHA-256 of its weights file.

    Quantised weights are widened to bfloat16, so the folder holds the quantised model in a type
    that every engine reads, not the original checkpoint. What is written:
    https://huggingface.co/docs/safetensors.

    :raises ModelError: the file is of another architecture, or has a tensor without a place.
    """
    file = GgufFile(source)
    architecture = file.metadata.get("general.architecture")
    if architecture != "gemma3":
        raise ModelError(f"{source}: a GGUF of {architecture!r}; only gemma3 can be converted")
    folder.mkdir(parents=True, exist_ok=True)
    progress("tokenizer", 0, 1)
    _write_tokenizer(file, folder)
    progress("tokenizer", 1, 1)
    config = config_of(file)
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    return _write_weights(list(file.tensors.values()), folder / WEIGHTS, progress)


def _write_weights(tensors: list[GgufTensor], path: Path, progress: Progress) -> str:
    header, size = _header(tensors)
    digest, done = sha256(), 0
    with path.open("wb") as file:
        for piece in (header, *_pieces(tensors)):
            file.write(piece)
            digest.update(piece)
            done += len(piece)
            progress("weights", done, len(header) + size)
    return digest.hexdigest()


def _header(tensors: list[GgufTensor]) -> tuple[bytes, int]:
    """The safetensors header, with its length before it, and the size of what follows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(np.prod(tensor.shape, dtype=np.int64))
        entries[tensor_name("gemma3", tensor.name)] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _pieces(tensors: list[GgufTensor]) -> Iterator[bytes]:
    """The tensors' values in bfloat16, a few rows at a time."""
    for tensor in tensors:
        shift = np.float32(1.0 if less_one("gemma3", tensor.name) else 0.0)
        for rows in tensor.chunks():
            yield to_bfloat16(tensor.values(rows) - shift).tobytes()


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
