"""Opens what a pre-training run draws from: one set, or several with their shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_nepa.config import DataConfig, require
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.mixture import Mixture, Source, source_names
from megatron_nepa.data.index.mixture_grammar import Part, read_mixture, samples_per_block
from megatron_nepa.data.loaders.pretraining import build_index, open_set


def build_sources(config: DataConfig, verbose: bool = True) -> DatasetIndex | Mixture | None:
    """The set that ``config.path`` names, or the mixture of several.

    Args:
        config: path as :func:`build_index` takes it, or several such with their shares
            (:mod:`~megatron_nepa.data.index.mixture_grammar`).
        verbose: say in one line each what was made or left out (one rank of a node is enough).

    Raises:
        ConfigError: shares that cannot be, or a source that cannot serve; the sentence names it.
    """
    parts = None if config.path is None else read_mixture(config.path)
    if parts is None:
        return build_index(config, verbose)
    return mixture_of(parts, lambda path: open_set(replace(config, path=path), verbose))


def mixture_of(parts: tuple[Part, ...], open_source: Callable[[str], DatasetIndex]) -> Mixture:
    """The mixture of sources.

    Args:
        parts: their paths and shares.
        open_source: opens the set at a path.

    Raises:
        ConfigError: a share that is too small, or a source that cannot serve; the sentence names it.
    """
    counts, names = samples_per_block(parts), source_names([part.path for part in parts])
    sources = []
    for part, count, name in zip(parts, counts, names, strict=True):
        index = open_source(part.path)
        require(len(index) > 0, f"{part.path} holds no image: leave it out of the mixture.")
        sources.append(Source(name, index, count))
    return Mixture(tuple(sources))
