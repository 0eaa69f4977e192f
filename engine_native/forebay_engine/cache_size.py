"""How many pages each group of layers gets."""

from __future__ import annotations

from collections.abc import Sequence as Items

from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.hf_config import ModelError, ModelShape

#: Where layers with and without a window share the memory, pages are divided as sequences of so
#: many windows need them, or as the longest ones do: shorter ones are then short of the first kind,
#: longer ones of the second.
_WINDOWS = 4


def cache_groups(
    config: EngineConfig,
    shape: ModelShape,
    itemsize: int,
    draft: ModelShape | None = None,
    *,
    kv_bytes: int,
) -> tuple[CacheGroup, ...]:
    """The groups of layers by window, those that see everything first, and their pages.

    :param itemsize: bytes of a number in the cache.
    :param draft: a draft model, whose layers use the same pages.
    :param kv_bytes: of all pages together, unless ``num_blocks`` says how many there are.
    :raises ModelError: they do not hold a page of each.
    """
    each = layer_windows(shape)
    windows = group_windows(shape)
    if config.num_blocks:
        return tuple(CacheGroup(config.num_blocks, window) for window in windows)
    slot = 2 * shape.num_kv_heads * shape.head_dim * itemsize
    pages = [slot * each.count(window) * config.block_size for window in windows]
    if draft is not None:
        slot = 2 * draft.num_kv_heads * draft.head_dim * itemsize
        for window in layer_windows(draft):
            pages[_number(windows, window)] += slot * config.block_size
    even = kv_bytes // sum(pages)
    if even < 1:
        raise ModelError(
            f"kv_cache_bytes: {kv_bytes} hold no page of {config.block_size} tokens "
            f"({sum(pages) // config.block_size} bytes each); give more"
        )
    if len(windows) == 1:
        return (CacheGroup(even, windows[0]),)
    few = _window_pages(config, shape, pages, even, kv_bytes)
    rest = (kv_bytes - few * pages[1]) // pages[0]
    return CacheGroup(rest), CacheGroup(few, windows[1])


def layer_windows(shape: ModelShape) -> list[int | None]:
    """Positions that each layer sees; None: all."""
    return [shape.sliding_window if slides else None for slides in shape.sliding]


def group_windows(shape: ModelShape) -> list[int | None]:
    """Of each group, how many positions its layers see; all first."""
    return sorted(set(layer_windows(shape)), key=lambda window: window is not None)


def group_of(groups: Items[CacheGroup], window: int | None) -> int:
    """The group whose pages a layer of another model with this window can use.

    :raises ModelError: it sees more than the groups keep.
    """
    return _number([group.window for group in groups], window)


def _number(windows: Items[int | None], window: int | None) -> int:
    if window in windows:
        return windows.index(window)
    for number, kept in enumerate(windows):
        if kept is None or (window is not None and window <= kept):
            return number
    raise ModelError(
        f"speculation: the draft model's layers see {window or 'all'} positions, but the model's "
        f"own keep {windows[0]}; choose a draft model with no wider windows"
    )


def _window_pages(
    config: EngineConfig, shape: ModelShape, pages: list[int], even: int, kv_bytes: int
) -> int:
    """Pages of the group with a window.

    :param pages: bytes of a page of each group.
    :param even: pages if both have the same number; never more than these.
    """
    size, window = config.block_size, shape.sliding_window or 1
    longest = config.max_model_len or shape.max_position_embeddings
    length = max(window, min(_WINDOWS * window, longest))
    shared = kv_bytes * window // (length * pages[0] + window * pages[1])
    least = CacheGroup(even, window).most_pages(longest, config.max_step_tokens, size)
    return min(max(shared, least), even)
