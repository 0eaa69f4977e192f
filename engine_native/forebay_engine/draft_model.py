"""A small model that guesses what a large one with the same vocabulary will say.

It keeps keys and values of its own on the same pages, of which it lacks none that is full: so a
prefix out of the cache has the small model's as well. It draws its guesses as the large model draws
its tokens, with the same parameters and the same noise: what both find likely they then choose
alike (Gumbel coupling; Daliri et al. 2024, https://arxiv.org/abs/2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from forebay_engine.batch import build_batch
from forebay_engine.cache import CacheGroup
from forebay_engine.cache_size import group_of, layer_windows
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts, measured
from forebay_engine.hf_config import ModelConfig, ModelError, ModelShape, TransformersShape
from forebay_engine.layers import LayerCache
from forebay_engine.models import build_model, read_shape
from forebay_engine.sampler import draw
from forebay_engine.step import NO_TOKEN, Guessed, Lookahead, Row, Sampled, StepPlan
from forebay_engine.weights import Weights


@dataclass(slots=True)
class _Way:
    """How far the draft model is with a row: ``token_ids[start : end]`` is next."""

    row: Row
    #: Of the sequence, with what was drawn and guessed.
    token_ids: list[int]
    start: int
    end: int
    #: Guesses still wanted, each behind the last token.
    left: int
    guesses: list[int] = field(default_factory=list)

    def next_row(self, groups: Items[int]) -> Row:
        """:param groups: the target model's groups of pages that the draft model's layers use."""
        return Row(
            seq_id=self.row.seq_id,
            token_ids=self.token_ids,
            start=self.start,
            count=self.end - self.start,
            block_tables=tuple(self.row.block_tables[group] for group in groups),
            sample=self.left > 0,
            sampling=replace(self.row.sampling, logprobs=None),
            num_prompt=self.row.num_prompt,
        )

    def take(self, token_id: int) -> None:
        if token_id == NO_TOKEN:
            self.left = 0
            return
        self.token_ids.append(token_id)
        self.guesses.append(token_id)
        self.start, self.end = self.end, self.end + 1
        self.left -= 1


class DraftModel:
    """A loaded draft model; building one reads the weights.

    :param groups: the target model's groups of pages.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelConfig | TransformersShape,
        groups: Items[CacheGroup],
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
        eos_token_ids: frozenset[int],
    ) -> None:
        if shape.served_length > shape.max_position_embeddings:
            raise ModelError(
                f"speculation: the draft model has {shape.max_position_embeddings} positions; "
                f"max_model_len must be no more, and is {shape.served_length}"
            )
        folder, quantization = _folder(config), config.quantization
        with Weights(folder, dtype, device, quantization) as weights, torch.inference_mode():
            self._model = build_model(shape, weights)
        self._block_size = config.block_size
        self._device = device
        self._eos = eos_token_ids
        windows = layer_windows(shape)
        #: Of each of the model's own windows, the group of pages its layers use.
        self._windows = list(dict.fromkeys(windows))
        self._groups = [group_of(groups, window) for window in self._windows]
        self._pages = [groups[group] for group in self._groups]
        self._caches = [
            LayerCache.empty(
                (
                    shape.num_kv_heads,
                    groups[group_of(groups, window)].num_blocks,
                    config.block_size,
                    shape.head_dim,
                ),
                kv_dtype,
                device,
            )
            for window in windows
        ]

    def guess(self, rows: Items[Row], sampled: Items[Sampled]) -> tuple[Guessed, ...]:
        """Catch up with the rows that have a ``lookahead``, and guess what follows ``sampled``."""
        drawn: dict[int, list[int]] = {}
        for item in sampled:
            drawn.setdefault(item.seq_id, []).append(item.token_id)
        ways = [
            self._begin(row, row.lookahead, drawn.get(row.seq_id, []))
            for row in rows
            if row.lookahead is not None
        ]
        going = [way for way in ways if way.start < way.end]
        while going:
            going.sort(key=lambda way: way.end - way.start > 1)
            tokens = self.run([way.next_row(self._groups) for way in going])
            going = [way for way in going if way.left]
            for way in going:
                way.take(tokens[way.row.seq_id])
            going = [way for way in going if way.left]
        return tuple(Guessed(way.row.seq_id, tuple(way.guesses)) for way in ways if way.guesses)

    def measured(self) -> StepCosts:
        """What a guess costs by the number of rows, before any request."""
        with torch.inference_mode():
            return measured(lambda plan: self.run(plan.rows), self._pages, self._block_size)

    def run(self, rows: Items[Row]) -> dict[int, int]:
        """Compute the rows' tokens; what it draws for those with ``sample``, by ``seq_id``."""
        batch = build_batch(StepPlan(tuple(rows)), self._block_size, self._device, self._windows)
        hidden = self._model.forward(batch.token_ids, batch.positions, self._caches, batch.paged)
        asking = [row for row in rows if row.sample]
        if not asking:
            return {}
        drawn = draw(self._model, hidden[batch.sample_at], asking, self._eos)
        return {item.seq_id: item.token_id for item in drawn}

    def _begin(self, row: Row, lookahead: Lookahead, drawn: Items[int]) -> _Way:
        """Up to the last token drawn if guesses are to follow, or else up to what is computed."""
        computed = row.start + row.count - len(row.draft) + max(0, len(drawn) - 1)
        start = min(lookahead.start, computed)
        if not lookahead.count or self._ends(row, drawn[-1]):
            return _Way(row, [*row.token_ids, *drawn][:computed], start, computed, 0)
        return _Way(row, [*row.token_ids, *drawn], start, computed + 1, lookahead.count)

    def _ends(self, row: Row, token_id: int) -> bool:
        """Whether nothing follows this token; where an end is not meant to count, none is drawn."""
        return token_id == NO_TOKEN or token_id in row.sampling.ends(self._eos)


def read_draft_shape(
    config: EngineConfig, target: ModelShape
) -> ModelConfig | TransformersShape | None:
    """What must be known of the draft model; None: there is none.

    :raises ModelError: its tokens are not the target model's.
    """
    if config.draft_model is None:
        return None
    folder, target_folder = _folder(config), Path(config.model).expanduser()
    shape = read_shape(folder, "auto")
    if shape.vocab_size != target.vocab_size:
        raise ModelError(
            f"speculation: {folder} has {shape.vocab_size} token ids, but {target_folder} "
            f"{target.vocab_size}; a draft model must have the same vocabulary"
        )
    if _vocabulary(folder) != _vocabulary(target_folder):
        raise ModelError(
            f"speculation: the tokens of {folder} are not those of {target_folder}; "
            "a draft model must have the same vocabulary"
        )
    return shape


def _folder(config: EngineConfig) -> Path:
    return Path(config.draft_model or "").expanduser()


def _vocabulary(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"speculation: {path} is missing; the vocabularies can't be compared")
    return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
