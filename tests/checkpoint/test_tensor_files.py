"""A folder's weights are those of the files that are meant, under their own names, or one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_nepa.checkpoint.reading.resume import find_checkpoint
from megatron_nepa.checkpoint.reading.tensor_files import INDEX_FILE, MODEL_FILE, read_folder, read_safetensors, unwrap
from megatron_nepa.checkpoint.reading.weights import read_consolidated
from megatron_nepa.config import ConfigError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE = torch.ones(2)


def write(folder: Path, files: dict[str, list[str]], index: dict[str, Any] | None = None) -> Path:
    for file, names in files.items():
        save_file({name: ONE.clone() for name in names}, folder / file)
    if index is not None:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    return folder


def test_only_the_files_that_are_meant_are_read(tmp_path: Path) -> None:
    assert read_folder(write(tmp_path, {MODEL_FILE: ["a"], B: ["b"]})).keys() == {"a"}
    (tmp_path / MODEL_FILE).unlink()
    write(tmp_path, {A: ["a"], B: ["b"], "model-old.safetensors": ["c"]}, {"a": A, "b": B})
    assert read_folder(tmp_path).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ({A: ["a"]}, {"a": A, "b": B}, f"{B} is missing"),
        ({A: ["a"], B: ["c"]}, {"a": A, "b": B}, f"{B} lacks b"),
        ({A: ["a", "c"]}, {"a": A}, f"{A} holds c, of which"),
        ({A: ["a"], MODEL_FILE: ["a"]}, {"a": A}, "holds both"),
        ({A: ["a"]}, {"a": f"../{A}"}, "lies in another folder"),
        ({A: ["a"]}, {"a": 3}, "is no index of safetensors, with a weight_map: a tensor's file is no name"),
        ({A: ["a"]}, None, f"holds {A} but no {INDEX_FILE}"),
        ({}, None, f"{MODEL_FILE} does not exist"),
    ],
)
def test_what_does_not_belong_together_is_named(
    files: dict[str, list[str]], index: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        read_folder(write(tmp_path, files, index))
    assert message in str(error.value)


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    whole = write(tmp_path, {MODEL_FILE: ["exp_avg.a"]}) / MODEL_FILE
    with pytest.raises(ConfigError, match="does not say what model it holds"):
        read_consolidated(whole)
    whole.write_bytes(whole.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="it may be cut short"):
        read_safetensors(whole)
    torch.save({"a": ONE}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="is a pickle by its name"):
        read_consolidated(tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"no checkpoint but weights.pth, a pickle"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["module.a.b", "_orig_mod.a.b", "model.module.a.b", "a._orig_mod.b"])
def test_wrappers_are_taken_off(name: str) -> None:
    assert unwrap({name: ONE}, Path("x")).keys() == {"a.b"}
    with pytest.raises(ConfigError, match=f"x holds a.b and {name}, which are both a.b"):
        unwrap({"a.b": ONE, name: ONE}, Path("x"))
