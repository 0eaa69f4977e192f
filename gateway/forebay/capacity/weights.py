"""How many weights a decoder has, from config.json alone, and their bytes in each format.

Counted tensor by tensor as transformers builds them; the tests compare the sums with its models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from forebay.capacity.line import CapacityError, Line, number
from forebay.capacity.shape import first_of, shape_of

__all__ = ["FORMATS", "Matrix", "Weights", "count", "stored_format", "weight_lines"]


class Format(Struct, frozen=True):
    """Bits of one weight of a linear layer, and of what is stored beside each group of them."""

    bits: int
    #: Weights that share a scale; 0: a row does, None: no scales.
    group: int | None = None
    beside: int = 0


#: What is not a linear layer stays in 16 bits under those narrower than that.
FORMATS = {
    "fp32": Format(32),
    "fp16": Format(16),
    "bf16": Format(16),
    "fp8": Format(8, 0, 32),
    "int8": Format(8, 0, 32),
    # As in GPTQ and AWQ: a scale in 16 bits and a zero in 4 for each 128.
    "int4": Format(4, 128, 20),
}


class Matrix(Struct, frozen=True):
    name: str
    rows: int
    columns: int
    #: How many there are of it.
    count: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.columns * self.count


class Weights(Struct, frozen=True):
    linears: tuple[Matrix, ...]
    #: Embeddings, and the head where it is a matrix of its own.
    embeddings: tuple[Matrix, ...]
    #: Norms and biases.
    vectors: int
    #: The family is not known and was taken for one like Llama.
    assumed: bool

    @property
    def linear_parameters(self) -> int:
        return sum(matrix.size for matrix in self.linears)

    @property
    def other_parameters(self) -> int:
        return sum(matrix.size for matrix in self.embeddings) + self.vectors

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def linear_bytes(self, form: str) -> float:
        return sum(_matrix_bits(matrix, FORMATS[form]) for matrix in self.linears) / 8

    def other_bytes(self, form: str) -> float:
        return self.other_parameters * max(FORMATS[form].bits, 16) / 8

    def bytes(self, form: str) -> float:
        return self.linear_bytes(form) + self.other_bytes(form)


def weight_lines(weights: Weights, form: str) -> Iterator[Line]:
    """How many parameters there are, and their bytes."""
    parts = [
        f"{number(weights.linear_parameters)} in linear layers",
        f"{number(weights.other_parameters)} in embeddings, norms and biases",
    ]
    yield Line("parameters", " + ".join(parts), weights.parameters, "parameters")
    width = FORMATS[form]
    beside = ""
    if width.group is not None:
        shared = f"{width.group} weights" if width.group else "row"
        beside = f" + {width.beside} bits a {shared}"
    wide = max(width.bits, 16)
    yield Line(
        f"weights in {form}",
        f"{number(weights.linear_parameters)} × {width.bits} bits{beside}, "
        f"{number(weights.other_parameters)} × {wide} bits",
        weights.bytes(form),
        "bytes",
    )


def stored_format(config: Mapping[str, Any]) -> str:
    """The format in which the checkpoint itself is.

    :raises CapacityError: it is one that is not known.
    """
    quantised: Mapping[str, Any] | None = config.get("quantization_config")
    if quantised:
        method = str(quantised.get("quant_method"))
        bits = {"fp8": "fp8"}.get(method) or {4: "int4", 8: "int8"}.get(quantised.get("bits", 0))
        if bits is None:
            raise CapacityError(
                f"config.json: weights quantised by {method!r} are not known; give --weights"
            )
        return bits
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    if dtype not in short:
        raise CapacityError(f"config.json: dtype {dtype!r} is not known; give --weights")
    return short[dtype]


def count(config: Mapping[str, Any]) -> Weights:
    """:raises CapacityError: a key is missing."""
    family = str(config.get("model_type", ""))
    if family in ("gpt2", "opt"):
        return _older(config, learned_offset=2 if family == "opt" else 0)
    hidden, layers = first_of(config, "hidden_size"), first_of(config, "num_hidden_layers")
    vocab = first_of(config, "vocab_size")
    linears = [*_attention(config, hidden, layers), *_feed_forward(config, hidden, layers)]
    embeddings = [Matrix("embeddings", vocab, hidden)]
    if not _tied(config, family):
        embeddings.append(Matrix("head", vocab, hidden))
    vectors = hidden + layers * _vectors_per_layer(config, family, hidden)
    if family == "deepseek_v3":  # a bias of each expert, for balance
        sparse = layers - int(config.get("first_k_dense_replace", 0))
        vectors += sparse * first_of(config, "n_routed_experts")
    if config.get("mlp_bias"):
        vectors += layers * (2 * first_of(config, "intermediate_size") + hidden)
    return Weights(tuple(linears), tuple(embeddings), vectors, family not in _KNOWN)


_KNOWN = {
    *("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gemma2"),
    *("gemma3_text", "deepseek_v2", "deepseek_v3"),
}
#: Families whose head is the embedding unless the file says otherwise.
_TIED = {"gemma2", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
_QK_NORM = {"qwen3", "qwen3_moe", "gemma3_text"}


def _tied(config: Mapping[str, Any], family: str) -> bool:
    return bool(config.get("tie_word_embeddings", family in _TIED))


def _attention(config: Mapping[str, Any], hidden: int, layers: int) -> Iterator[Matrix]:
    shape = shape_of(config)
    if shape.latent is not None:
        yield from _latent_attention(config, hidden, layers, shape.heads)
        return
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Matrix("query", wide, hidden, layers)
    yield Matrix("key", narrow, hidden, layers)
    yield Matrix("value", narrow, hidden, layers)
    yield Matrix("attention output", hidden, wide, layers)


def _latent_attention(
    config: Mapping[str, Any], hidden: int, layers: int, heads: int
) -> Iterator[Matrix]:
    """DeepSeek-V2 (arXiv 2405.04434), section 2.1."""
    rank, rope = first_of(config, "kv_lora_rank"), first_of(config, "qk_rope_head_dim")
    nope, value = first_of(config, "qk_nope_head_dim"), first_of(config, "v_head_dim")
    into = hidden
    if config.get("q_lora_rank"):
        into = first_of(config, "q_lora_rank")
        yield Matrix("query, down", into, hidden, layers)
    yield Matrix("query", heads * (nope + rope), into, layers)
    yield Matrix("latent", rank + rope, hidden, layers)
    yield Matrix("latent, up", heads * (nope + value), rank, layers)
    yield Matrix("attention output", hidden, heads * value, layers)


def _feed_forward(config: Mapping[str, Any], hidden: int, layers: int) -> Iterator[Matrix]:
    """Gate, up and down of each layer, or of each expert with a router before them."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    experts = next((int(config[name]) for name in names if config.get(name)), 0)
    dense = _dense_layers(config, layers) if experts else layers
    sparse = layers - dense
    if dense:
        yield Matrix("feed-forward", 3 * first_of(config, "intermediate_size"), hidden, dense)
    if sparse:
        inner = first_of(config, "moe_intermediate_size", "intermediate_size")
        yield Matrix("experts", 3 * inner, hidden, sparse * experts)
        yield Matrix("router", experts, hidden, sparse)
        if shared := config.get("n_shared_experts"):
            yield Matrix("shared experts", 3 * inner * int(shared), hidden, sparse)


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers without experts: the first ones, those named, or all but every so many."""
    first = int(config.get("first_k_dense_replace") or 0)
    named = set(config.get("mlp_only_layers") or ())
    every = int(config.get("decoder_sparse_step") or 1)
    return sum(i < first or i in named or (i + 1) % every != 0 for i in range(layers))


def _vectors_per_layer(config: Mapping[str, Any], family: str, hidden: int) -> int:
    shape = shape_of(config)
    vectors = hidden * (4 if family in _FOUR_NORMS else 2)
    if shape.latent is not None:
        return vectors + shape.latent.rank + int(config.get("q_lora_rank") or 0)
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if family in _QK_NORM:
        vectors += 2 * shape.head_dim
    if family == "qwen2":
        vectors += wide + 2 * narrow
    elif config.get("attention_bias"):
        vectors += wide + 2 * narrow + hidden
    return vectors


def _older(config: Mapping[str, Any], learned_offset: int) -> Weights:
    """GPT-2 and OPT: learned positions, feed-forward parts without gates, biases everywhere."""
    hidden = first_of(config, "hidden_size", "n_embd")
    layers = first_of(config, "num_hidden_layers", "n_layer")
    given = config.get("n_inner") or config.get("ffn_dim")
    inner = int(given) if given else 4 * hidden
    positions = first_of(config, "n_positions", "max_position_embeddings") + learned_offset
    vocab = first_of(config, "vocab_size")
    outer = int(config.get("word_embed_proj_dim") or hidden)
    linears = [
        Matrix("query, key, value, output", 4 * hidden, hidden, layers),
        Matrix("feed-forward", 2 * inner, hidden, layers),
    ]
    if outer != hidden:
        linears.append(Matrix("into and out of the embedding", hidden, outer, 2))
    embeddings = [Matrix("embeddings", vocab, outer), Matrix("positions", positions, hidden)]
    biases = 4 * hidden + inner + hidden
    final = 0 if config.get("do_layer_norm_before") is False else 2 * hidden
    return Weights(
        tuple(linears), tuple(embeddings), layers * (4 * hidden + biases) + final, assumed=False
    )


def _matrix_bits(matrix: Matrix, form: Format) -> int:
    bits = matrix.size * form.bits
    if form.group is None:
        return bits
    groups = 1 if form.group == 0 else -(-matrix.columns // form.group)
    return bits + matrix.rows * matrix.count * groups * form.beside
