"""The output layer: logits of all tokens, or of the few among which a draw must be."""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from forebay_engine.hf_config import ModelConfig, ModelError
from forebay_engine.linear import Linear, in_turn
from forebay_engine.memory import is_screened
from forebay_engine.weights import Weights
from forebay_kernels.cpu import DenseLinear, Screen, screens
from forebay_kernels.matrix import Dense, Matrix

#: Logits ``[rows, n]`` and the ids ``[n]`` of their tokens, which rise.
Shortlist = tuple[Tensor, Tensor]


class Head:
    """``hidden @ matrix.T``, and a copy of large plain matrices that says which of it matters.

    ``softcap``: logits are bent to stay below it in size.
    """

    def __init__(self, matrix: Matrix, softcap: float | None = None) -> None:
        self._linear, self._softcap = Linear(matrix), softcap
        self._screen: Future[Screen | None] | None = None
        if softcap is None and isinstance(matrix, Dense) and is_screened(*matrix.shape):
            self._screen = in_turn(partial(self._made, matrix.weight))

    def _made(self, weight: Tensor) -> Screen | None:
        product = self._linear.product
        if isinstance(product, DenseLinear) and screens(weight):
            return Screen(product, weight)
        return None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden] -> [rows, vocab]``."""
        logits = self._linear(hidden)
        if self._softcap is None:
            return logits
        return torch.tanh(logits.float() / self._softcap) * self._softcap

    def shortlist(
        self, hidden: Tensor, temperatures: Items[float], keys: Items[int]
    ) -> Shortlist | None:
        """The logits among which each row's draw is, as in ``Screen``; None: all are needed."""
        screen = None if self._screen is None else self._screen.result()
        return None if screen is None else screen.shortlist(hidden, temperatures, keys)


class NoHead:
    """Of a model that was stored without."""

    def __call__(self, hidden: Tensor) -> Tensor:
        raise ModelError("this model has no output layer: it gives embeddings, not tokens")

    def shortlist(
        self, hidden: Tensor, temperatures: Items[float], keys: Items[int]
    ) -> Shortlist | None:
        return None


class WithHead:
    """What every decoder with a head does behind its last hidden states."""

    _head: Head | NoHead

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden] -> [rows, vocab]``."""
        return self._head(hidden)

    def shortlist(
        self, hidden: Tensor, temperatures: Items[float], keys: Items[int]
    ) -> Shortlist | None:
        """As ``Head``'s."""
        return self._head.shortlist(hidden, temperatures, keys)


def head(
    config: ModelConfig, weights: Weights, embedding: Tensor, *, softcap: float | None = None
) -> Head | NoHead:
    """The output layer; config.json may say that it is the embedding ``[vocab, hidden]``."""
    if config.headless:
        return NoHead()
    if not config.tie_word_embeddings:
        return Head(weights.matrix("lm_head", *embedding.shape), softcap)
    weights.skip(["lm_head.weight"])
    return Head(weights.tied(embedding), softcap)
