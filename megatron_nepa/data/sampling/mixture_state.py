"""What a checkpoint records of a mixture, and how a run goes on from it with the same sources and shares or others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_nepa.config import ConfigError, require
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.mixture_grammar import BLOCK
from megatron_nepa.data.sampling.mixing import Mixing


def state_of(mixture: Mixture) -> dict[str, Any]:
    """What the samples of a mixture are a function of, besides seed and k, as JSON."""
    return {
        "since": mixture.since,
        "sources": [
            {"name": source.name, "key": key, "per_block": source.per_block, "drawn": source.drawn}
            for source, key in zip(mixture.sources, mixture.keys, strict=True)
        ],
    }


def continued(mixture: Mixture, state: Mapping[str, Any] | None, samples: int, seed: int) -> tuple[Mixture, list[str]]:
    """A mixture as it goes on from a checkpoint.

    A source that the checkpoint's run drew from too goes on in its own order where that left it; a new one begins.

    Args:
        mixture: as the user names it.
        state: the checkpoint's, from :func:`state_of`; None where its run drew from one set.
        samples: that the checkpoint's run had consumed.
        seed: of the run.

    Returns:
        The mixture, and what is not as it was, in words.

    Raises:
        ConfigError: a state that this release cannot read.
    """
    if samples == 0:
        return mixture, []
    if state is None:
        return replace(mixture, since=samples), ["they were one set before, and every source begins its first pass"]
    try:
        sources: dict[str, dict[str, Any]] = {source["key"]: source for source in state["sources"]}
        shares = {key: int(source["per_block"]) for key, source in sources.items()}
        before = Mixing(seed, tuple(shares.values()), state["since"], tuple(s["drawn"] for s in sources.values()))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the checkpoint's record of its mixture is damaged ({error!r}).") from None
    block = sum(shares.values())
    require(
        block == BLOCK,
        f"the checkpoint is of a run whose shares hold in blocks of {block} samples; this release draws in blocks of "
        f"{BLOCK}: continue it with the release that wrote it, or start from its weights with --init_from.",
    )
    named = dict(zip(mixture.keys, mixture.sources, strict=True))
    if {key: source.per_block for key, source in named.items()} == shares:
        unchanged = tuple(replace(named[key], drawn=int(sources[key]["drawn"])) for key in shares)
        return Mixture(unchanged, before.since), []
    drawn = dict(zip(shares, before.drawn_until(samples), strict=True))
    went_on = {key: replace(source, drawn=drawn.get(key, 0)) for key, source in named.items()}
    said = [f"{sources[key]['name']} is left out" for key in shares if key not in named]
    for key, source in went_on.items():
        now = f"{source.per_block / BLOCK:.2%}"
        if key in shares:
            was = f"{shares[key] / BLOCK:.2%}"
            said.append(f"{source.name} {was} -> {now}, goes on at pass {source.drawn / len(source.index):.2f}")
        else:
            said.append(f"{source.name} is new, {now}")
    return Mixture(tuple(went_on.values()), samples), said
