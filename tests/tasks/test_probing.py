"""Probes of a frozen trunk: as a loop by hand, the same on any number of ranks, exact, and refused with a reason."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_nepa.checkpoint.reading.weights import Weights, load_whole, stored_tensors, write_weights
from megatron_nepa.config import ConfigError, DataConfig, ModelConfig
from megatron_nepa.data.index.folder import scan_folder
from megatron_nepa.data.loaders.classification import FinetuningLoader
from megatron_nepa.data.sampling.feed import Feed
from megatron_nepa.data.sampling.rank_share import Share
from megatron_nepa.models.build import Build
from megatron_nepa.models.probe import LinearProbe, TrunkFeatures
from megatron_nepa.models.trunk import Trunk
from megatron_nepa.parallel.parameters import initialize_parameters
from megatron_nepa.parallel.topology import TensorGroup, build_topology
from megatron_nepa.tasks.features import Features, knn_accuracy, linear_accuracy
from megatron_nepa.tasks.probing import CROPS_ONLY
from megatron_nepa.training.engine.engine import TrainingEngine
from megatron_nepa.training.engine.lars import build_lars
from megatron_nepa.training.results import read_results
from tests.distributed.ranks import run_ranks
from tests.runs import Killed, call_script, kill_in_step, read_metrics, without_training
from tests.tasks.labelled import TINY, make_labelled

MODEL = ModelConfig(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=48,
    position_embedding="none",
    layer_scale_init=0.5,
)
STEPS, SEED = 4, 1337
FLAGS = [flag for flag in TINY if not flag.startswith("--augmentation")]
FLAGS += [
    "--dtype=fp32",
    "--trunk.block=0",
    "--trunk.pooling=mean",
    f"--steps={STEPS}",
    "--evaluation.every=2",
    "--save_every=2",
]
CLASSES = ("a", "b", "c", "d", "e", "f")  # of three colours: two look alike


def build_trunk() -> Trunk:
    trunk = Trunk(MODEL)
    initialize_parameters(trunk, 3, 0.2, TensorGroup())
    return trunk.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk's checkpoint, and labelled images: 24 to train on, 18 to validate, no multiple of 2 ranks x 4."""
    folder = tmp_path_factory.mktemp("probing")
    tensors = {f"trunk.{name}": value for name, value in build_trunk().state_dict().items()}
    write_weights(Weights(MODEL, tensors, "a trunk drawn at random"), folder / "trunk")
    make_labelled(folder / "train", 4, CLASSES)
    make_labelled(folder / "validation", 3, CLASSES)
    return folder


def probe(folder: Path, output: Path, *more: str) -> str | None:
    from examples.linear_probe import main

    given = [f"--trunk={folder / 'trunk'}", f"--validation_data={folder / 'validation'}", f"--output_dir={output}"]
    given += [*FLAGS, *more]
    evaluates = "--evaluate_only" in more
    if evaluates or any(flag.startswith("--knn") for flag in more):
        given = without_training(given)
    return call_script(main, given if evaluates else [f"--data={folder / 'train'}", *given])


def probe_all(folder: Path, output: Path, *grid: str) -> None:
    """Train, killed in step 3 and continued; evaluate what was trained, classify by neighbours."""
    whole = TrainingEngine.step
    kill_in_step(3)
    with pytest.raises(Killed):
        probe(folder, output, *grid)
    TrainingEngine.step = whole  # type: ignore[method-assign]
    assert probe(folder, output, *grid) is None
    said = probe(folder, output, "--evaluate_only", *grid)
    assert said is None, said
    assert probe(folder, output, "--knn=5", *grid) is None


def evaluate_another_block(folder: Path, output: Path) -> list[str | None]:
    assert probe(folder, output) is None
    return [probe(folder, output, "--evaluate_only", flag) for flag in ("--trunk.block=1", "--trunk.pooling=last")]


def test_a_layer_is_evaluated_on_the_features_that_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    block, pooling = run_ranks(1, evaluate_another_block, folder, tmp_path / "run")[0]
    assert "was trained with --trunk.block 0, not 1:" in str(block)
    assert "was trained with --trunk.pooling mean, not last:" in str(pooling)


def head_of(output: Path) -> dict[str, Tensor]:
    checkpoint = output / "checkpoints" / f"step_{STEPS:08d}"
    stored = stored_tensors(checkpoint)
    return load_whole(checkpoint, list(stored), stored)


def train_by_hand(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The same probe in plain torch: BatchNorm1d, a linear layer and MAE's rule, on features of the loader's images."""
    features = TrunkFeatures(build_trunk(), 0, "mean")
    share = Share(12, 12, 1, 0, 1, 0, 1)
    data = DataConfig(horizontal_flip=True, num_threads=1)
    feed = Feed(share, SEED, torch.device("cpu"), torch.float32)
    loader = FinetuningLoader(scan_folder(folder / "train"), data, CROPS_ONLY, 32, 6, feed)
    drawn = LinearProbe(32, 6, Build(seed=SEED))
    norm, linear = nn.BatchNorm1d(32, affine=False, eps=1e-6), nn.Linear(32, 6)
    linear.load_state_dict(drawn.classifier.state_dict())
    velocity = {name: torch.zeros_like(value) for name, value in linear.named_parameters()}
    losses = []
    for step in range(STEPS):
        batch = next(loader)
        assert batch.labels is not None
        assert set(batch.labels.unique().tolist()) == {0.0, 1.0}
        logits = linear(norm(features(batch.images, batch.sample_index)))
        loss = nn.functional.cross_entropy(logits, batch.labels.argmax(1))
        linear.zero_grad()
        loss.backward()
        losses.append(loss.item())
        rate = 0.1 * 12 / 256 * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        for name, param in linear.named_parameters():
            change = param.grad
            assert change is not None
            if name == "weight":
                change = change * 0.001 * param.norm() / change.norm()
            velocity[name] = 0.9 * velocity[name] + change
            param.data -= rate * velocity[name]
    loader.close()
    state = {f"master.classifier.{name}": value.detach() for name, value in linear.named_parameters()}
    state |= {f"momentum_buffer.classifier.{name}": value.detach() for name, value in velocity.items()}
    buffers = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return losses, state | {f"buffer.norm.{name}": value for name, value in buffers.items() if value is not None}


def test_the_shared_loop_trains_as_a_loop_by_hand_on_any_grid_killed_or_not(folder: Path, tmp_path: Path) -> None:
    grids: dict[str, tuple[int, list[str]]] = {
        "one": (1, ["--micro_batch_size=12"]),
        "data": (2, ["--micro_batch_size=6"]),
        "tensor": (2, ["--micro_batch_size=12", "--tensor_parallel_size=2", "--sequence_parallel"]),
    }
    schedule = ["--optimizer.warmup_ratio=0"]
    for name, (ranks, grid) in grids.items():
        run_ranks(ranks, probe_all, folder, tmp_path / name, *grid, *schedule)
    losses, state = train_by_hand(folder)
    one = tmp_path / "one"
    for name in grids:
        output = tmp_path / name
        start, *rows = read_metrics(output)
        assert start["step"] == 0
        assert start["val_loss"] == pytest.approx(np.log(6), abs=0.2)  # the layer says nothing yet
        assert [row["loss"] for row in rows] == pytest.approx(losses, abs=2e-6)
        found = head_of(output)
        assert found.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-4)

        # the evaluation of the run, of its checkpoint, and the neighbours, exact
        last = rows[-1]
        assert [row["step"] for row in rows if "val_top1" in row] == [2, 4]
        alone = read_results(output / "evaluation.json")[-1]
        best = json.loads((output / "checkpoints/best.json").read_text())
        assert alone["top1"] == best["value"] == max(row["val_top1"] for row in rows if "val_top1" in row)
        assert last["val_top1"] == read_metrics(one)[-1]["val_top1"]
        neighbours = read_results(output / "neighbours.json")[-1]
        assert neighbours == read_results(one / "neighbours.json")[-1]
        assert (neighbours["settings"]["k"], neighbours["settings"]["train_images"]) == (5, 24)
        assert alone["settings"]["trunk"] == neighbours["settings"]["trunk"]
        assert neighbours["origin"].startswith("starting from the a trunk drawn at random")
        assert neighbours["knn_top1"] * 18 == pytest.approx(round(neighbours["knn_top1"] * 18))
        assert 1 / 6 < neighbours["knn_top1"] < 1  # a number that could differ, better than a guess


def continue_as_written_before(folder: Path, output: Path, *flags: str) -> str | None:
    """Continue a finished probe whose config.json is of the time when --trunk.dtype was the trunk's dtype."""
    assert probe(folder, output, "--steps=2") is None
    path = output / "config.json"
    config = json.loads(path.read_text())
    config["run"]["trunk"]["dtype"], config["run"]["dtype"] = config["run"]["dtype"], "fp32"
    path.write_text(json.dumps(config))
    return probe(folder, output, "--steps=2", *flags)


def test_a_probe_of_an_older_version_goes_on_in_its_trunks_dtype(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(1, continue_as_written_before, folder, tmp_path / "same")[0] is None
    refused = run_ranks(1, continue_as_written_before, folder, tmp_path / "other", "--dtype=bf16")[0]
    assert "holds another run (dtype fp32 there, bf16 here)" in str(refused)


def dtypes_of_a_probe(folder: Path, output: Path) -> dict[str, torch.dtype]:
    """Which dtype a probe's kernels, peak and trunk are of, and which its layer's; torch's notices are errors."""
    from megatron_nepa.kernels import dispatch
    from megatron_nepa.training import train

    found: dict[str, torch.dtype] = {}
    select, peak = dispatch.select_kernels, train.device_peak_flops

    def selected(*arguments: Any, dtype: torch.dtype, **more: Any) -> Any:
        found["kernels"] = dtype
        return select(*arguments, dtype=dtype, **more)

    def looked_up(device: torch.device, dtype: torch.dtype) -> Any:
        found["peak"] = dtype
        return peak(device, dtype)

    dispatch.select_kernels, train.device_peak_flops = selected, looked_up  # type: ignore[assignment]
    warnings.filterwarnings("error", r".*torch\.distributed", FutureWarning)
    forward = TrunkFeatures.forward

    def of_trunk(features: TrunkFeatures, images: Tensor, index: Tensor) -> Tensor:
        found["trunk"] = features.trunk.norm.weight.dtype
        return forward(features, images, index)

    classify = LinearProbe.forward

    def of_layer(layer: LinearProbe, features: Tensor) -> Tensor:
        found["layer"] = layer.classifier.weight.dtype
        return classify(layer, features)

    TrunkFeatures.forward, LinearProbe.forward = of_trunk, of_layer  # type: ignore[method-assign]
    assert probe(folder, output, "--knn=5") is None
    assert found["trunk"] == torch.float32
    assert probe(folder, output, "--steps=1", "--dtype=bf16") is None
    assert json.loads((output / "neighbours.json").read_text())[0]["settings"]["dtype"] == "fp32"
    return found


def test_kernels_and_mfu_are_of_the_trunks_dtype(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(1, dtypes_of_a_probe, folder, tmp_path / "run")[0]
    assert found.pop("layer") == torch.float32
    assert found == dict.fromkeys(("kernels", "peak", "trunk"), torch.bfloat16)


def separable(seed: int, count: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    values = torch.randn(count, 16, generator=generator)
    values[torch.arange(count), labels] += 12
    return Features(1000 + 50 * values, labels)  # far from 0 and wide: the probe has to normalise


def test_separable_features_are_classified_without_an_error() -> None:
    train, validation = separable(0, 400), separable(1, 103)
    head = LinearProbe(16, 4, Build(seed=SEED))
    optimizer = build_lars([{"params": [head.classifier.weight]}, {"params": [head.classifier.bias]}], 0.9)
    for group in optimizer.param_groups:
        group["lr"] = 10.0
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(train.values), train.labels).backward()
        optimizer.step()
    head.eval()
    assert bool((head(validation.values).argmax(1) == validation.labels).all())
    for found in run_ranks(2, accuracies, train, validation):
        assert found == {"knn_top1": 1.0, "knn_top5": 1.0, "linear_top1": 1.0}


def accuracies(train: Features, validation: Features) -> dict[str, float]:
    topology = build_topology(torch.device("cpu"), 1)
    return {**knn_accuracy(train, validation, 20, topology), **linear_accuracy(train, validation, topology)}


def refusals(folder: Path, output: Path, cases: list[list[str]]) -> list[str | None]:
    return [probe(folder, output, *case) for case in cases]


def test_bad_input_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train" / "a", tmp_path / "flat")
    shutil.copytree(folder / "train" / "a", tmp_path / "one" / "red")
    cases: dict[str, list[str]] = {
        "has images without a label": [f"--data={tmp_path / 'flat'}"],
        "are of one class": [f"--data={tmp_path / 'one'}"],
        "trunk.block is 2; the trunk's 2 blocks are counted from 0 to 1": ["--trunk.block=2"],
        "--trunk": ["--model.num_layers=3"],
        "holds no checkpoint": [f"--trunk={tmp_path}"],
        "give its checkpoint as --trunk": ["--trunk=none"],
        "give it as --trunk": [f"--init_from={folder / 'trunk'}"],
        "ask for 24 or less": ["--knn=25"],
        "holds a trunk, not the layer of a probe": ["--evaluate_only", f"--init_from={folder / 'trunk'}"],
        "000.jpg is a file; give a folder": [*["--knn=5", f"--output_dir={folder / 'train/a/000.jpg/below'}"]],
        "--trunk.dtype is called --dtype": ["--trunk.dtype=fp32"],
    }
    found = run_ranks(1, refusals, folder, tmp_path / "run", list(cases.values()))[0]
    for (reason, case), message in zip(cases.items(), found, strict=True):
        assert message is not None, case
        assert message.startswith(ConfigError.__name__), message
        assert reason in message, message
    assert not (tmp_path / "run").exists()


def test_frozen_trunk_and_blocks() -> None:
    """The last block's feature is the final norm's output, an earlier one's its stream; nothing gets a gradient."""
    trunk = build_trunk()
    images, index = torch.randn(2, 3, 32, 32), torch.arange(2)
    output = trunk(images, index, (0,))
    wanted: dict[Any, Tensor] = {None: output.output, 0: output.taps[0]}
    for block, rows in wanted.items():
        tokens = rows.view(2, 16, 32)
        for pooling, value in (("last", tokens[:, -1]), ("mean", tokens.mean(1))):
            found = TrunkFeatures(trunk, block, pooling)(images, index)  # type: ignore[arg-type]
            assert not found.requires_grad
            torch.testing.assert_close(found, value)
