"""How many pages each group of layers gets."""

from __future__ import annotations

from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.hf_config import ModelError, ModelShape

#: Where layers with and without a window share the memory, pages are divided as sequences of so
#: many windows need them, or as the longest ones do: shorter ones are then short of the first kind,
#: longer ones of the second.
_WINDOWS = 4


def cache_groups(config: EngineConfig, shape: ModelShape, itemsize: int) -> tuple[CacheGroup, ...]:
    """The groups of layers by window, those that see everything first, and their pages.

    :param itemsize: bytes of a number in the cache.
    :raises ModelError: ``kv_cache_bytes`` does not hold a page of each.
    """
    sliding = sum(shape.sliding)
    layers: dict[int | None, int] = {None: shape.num_layers - sliding}
    if sliding:
        layers[shape.sliding_window] = sliding
    windows = [window for window, count in layers.items() if count]
    if config.num_blocks:
        return tuple(CacheGroup(config.num_blocks, window) for window in windows)
    slot = 2 * shape.num_kv_heads * shape.head_dim * itemsize
    pages = [slot * layers[window] * config.block_size for window in windows]
    even = config.kv_cache_bytes // sum(pages)
    if even < 1:
        raise ModelError(
            f"kv_cache_bytes: {config.kv_cache_bytes} hold no page of {config.block_size} tokens "
            f"({sum(pages) // config.block_size} bytes each); give more"
        )
    if len(windows) == 1:
        return (CacheGroup(even, windows[0]),)
    few = _window_pages(config, shape, pages, even)
    rest = (config.kv_cache_bytes - few * pages[1]) // pages[0]
    return CacheGroup(rest), CacheGroup(few, windows[1])


def _window_pages(config: EngineConfig, shape: ModelShape, pages: list[int], even: int) -> int:
    """Pages of the group with a window.

    :param pages: bytes of a page of each group.
    :param even: pages if both have the same number; never more than these.
    """
    size, window = config.block_size, shape.sliding_window or 1
    longest = config.max_model_len or shape.max_position_embeddings
    length = max(window, min(_WINDOWS * window, longest))
    shared = config.kv_cache_bytes * window // (length * pages[0] + window * pages[1])
    least = CacheGroup(even, window).most_pages(longest, config.max_step_tokens, size)
    return min(max(shared, least), even)
