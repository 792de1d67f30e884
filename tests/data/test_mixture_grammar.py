"""What --data may say of several sets: every mistake is one sentence that names the source, and a path always wins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_nepa.config import ConfigError, DataConfig
from megatron_nepa.data.index.mixture import Mixture, source_names
from megatron_nepa.data.index.mixture_grammar import BLOCK, Part, read_mixture, samples_per_block
from megatron_nepa.data.loaders.pretraining import build_index
from megatron_nepa.data.loaders.sources import build_sources
from tests.runs import make_images


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shares(text: str) -> dict[str, float] | None:
    parts = read_mixture(text)
    return None if parts is None else {part.path: round(part.share, 12) for part in parts}


def test_shares_are_read(here: Path) -> None:
    for name in ("a", "b", "c"):
        (here / name).mkdir()
    assert shares("a=0.7,b=0.3") == {"a": 0.7, "b": 0.3}
    assert shares("a=0.7,missing=0.3") == {"a": 0.7, "missing": 0.3}  # which opening it then names
    thirds = read_mixture("a=0.333,b=0.333,c=0.333")
    assert thirds is not None
    assert [part.share for part in thirds] == pytest.approx([1 / 3] * 3)
    assert samples_per_block(thirds) == (3334, 3333, 3333)


def test_an_existing_path_wins(here: Path) -> None:
    for name in ("a", "a=0.7,b=0.3", "x=1,5", "run=3", "mixture.json"):
        (here / name).mkdir()
    assert read_mixture("a=0.7,b=0.3") is None
    assert read_mixture("x=1,5") is None
    assert read_mixture("mixture.json") is None  # a folder of that name
    assert shares("x=1,5=0.5,a=0.5") == {"x=1,5": 0.5, "a": 0.5}
    assert shares("a=0.5,run=3=0.5") == {"a": 0.5, "run=3": 0.5}
    assert read_mixture("run=4/images") is None  # missing, and no mixture
    with pytest.raises(ConfigError, match="the data folder run=4/images does not exist"):
        build_sources(DataConfig(path="run=4/images"))


def test_a_file_names_paths_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "sets.json"
    file.write_bytes(json.dumps({"a": 0.25, "/data/b": 0.25, "s3://c/d": 0.5}).encode("utf-8-sig"))
    assert shares(str(file)) == {str(tmp_path / "a"): 0.25, "/data/b": 0.25, "s3://c/d": 0.5}


REFUSED = {
    "a=0.7,b": "b has no share",
    "a,b=0.3": "a has no share",
    "a,b": "a has no share",
    "a=0.7": "gives a a share, and no other source",
    "a=0.7,b=-0.3": "the share of b is -0.3; it must be positive",
    "a=1,b=0": "the share of b is 0; it must be positive",
    "a=0.7,b=nan": "the share of b is nan",
    "a=0.7,b=inf": "the share of b is inf",
    "a=0.7,b=much": "the share of b is 'much'; it must be a number",
    "a=0.7,b=0.2": "add up to 0.9, not to 1; in the same proportions they are a=0.7778, b=0.2222",
    "a=70,b=30": "add up to 100, not to 1; in the same proportions they are a=0.7, b=0.3",
    "a=0.5,b=0.3,a=0.2": "names a twice",
    "a=0.5,./a=0.5": "names ./a twice",
    "a=0.7,b=0.3,": "has an empty entry",
    "a=0.5,link=0.5": "names link twice",
    "a=0.5,=0.5": "=0.5 has no path",
    '{"a": 0.5, "": 0.5}.json': "names the source '', which is no path",
    '{"a": 0.5, "b\\u0000": 0.5}.json': r"names the source 'b\x00', which is no path",
    '{"a": 0.5, "\\ud800": 0.5}.json': r"names the source '\ud800', which is no path",
    "a=0.5,b=0.5,a=0.5": "can be read in 2 ways whose paths all exist",
    "none.json": None,
    "[1, 2].json": "holds no mixture",
    '{"a": 0.7.json': "cannot be read as JSON",
    '{"a": "x", "b": 1}.json': "is 'x'; it must be a number",
    '{"a": true, "b": 1}.json': "is True; it must be a number",
    '{"a": 0.5, "b": 0.3, "a": 0.2}.json': "names a twice",
    "{}.json": "gives nothing a share",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_one_sentence(text: str, here: Path) -> None:
    for name in ("a", "b", *(("a=0.5,b",) if text == "a=0.5,b=0.5,a=0.5" else ())):
        (here / name).mkdir()
    (here / "link").symlink_to("a")
    said = REFUSED[text]
    if text.endswith(".json") and said is not None:
        (here / "mixture.json").write_text(text.removesuffix(".json"))
        text = "mixture.json"
    if said is None:
        assert read_mixture(text) is None
        return
    with pytest.raises(ConfigError) as refused:
        read_mixture(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_share_below_one_sample_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"share 1e-05 of tiny is less than one of 10,000 samples: .* at least 0.0001"
    ):
        samples_per_block((Part("large", 0.99999), Part("tiny", 0.00001)))


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_the_samples_of_a_block_are_the_shares(count: int) -> None:
    weights = np.random.default_rng(count).random(count) + 0.01
    parts = tuple(Part(str(i), float(weight)) for i, weight in enumerate(weights / weights.sum()))
    counts = samples_per_block(parts)
    assert sum(counts) == BLOCK
    assert max(abs(n - part.share * BLOCK) for n, part in zip(counts, parts, strict=True)) < 1


def test_a_source_that_cannot_serve_is_named(here: Path) -> None:
    make_images(here / "good", 2)
    (here / "empty").mkdir()
    (here / "bad").mkdir()
    (here / "bad" / "0.jpg").write_bytes(b"no image")
    for name, said in {
        "empty": "empty holds no images",
        "missing": "missing does not exist",
        "bad": "in bad can be",
    }.items():
        with pytest.raises(ConfigError, match=said):
            build_sources(DataConfig(path=f"good=0.5,{name}=0.5"))


def test_only_pretraining_draws_from_a_mixture(here: Path) -> None:
    make_images(here / "a", 2)
    make_images(here / "b", 3)
    mixture = build_sources(DataConfig(path="a=0.5,b=0.5"))
    assert isinstance(mixture, Mixture)
    assert [source.name for source in mixture.sources] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"a=0\.5,b=0\.5 is a mixture of sets, which pre-training alone draws from"):
        build_index(DataConfig(path="a=0.5,b=0.5"))


def test_names_tell_sources_apart() -> None:
    assert source_names(["x/train.index", "y/val.index/"]) == ("train.index", "val.index")
    assert source_names(["x/train.index", "y/train.index"]) == ("x/train.index", "y/train.index")
    assert source_names(["/d/x/t", "/d/x/u", "/e/x/t"]) == ("d/x/t", "d/x/u", "e/x/t")
    assert source_names(["t", "../t"]) == ("t", "../t")
