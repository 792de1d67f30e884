"""Look into checkpoints, convert them to and from other formats, and check the result.

    python tools/convert_checkpoint.py inspect runs/nepa_b
    python tools/convert_checkpoint.py to_release runs/nepa_b_release nepa-base-patch14-224
    python tools/convert_checkpoint.py from_release nepa-base-patch14-224 nepa_b_start
    python tools/convert_checkpoint.py to_hf runs/nepa_b nepa_b_hf
    python tools/convert_checkpoint.py from_hf nepa_b_hf nepa_b_start
    python tools/convert_checkpoint.py to_timm runs/nepa_b nepa_b_timm
    python tools/convert_checkpoint.py to_onnx runs/nepa_b nepa_b.onnx
    python tools/convert_checkpoint.py consolidate runs/nepa_b/checkpoints/step_00001000 nepa_b.safetensors
    python tools/convert_checkpoint.py universal runs/nepa_b nepa_b_universal
    python tools/convert_checkpoint.py verify runs/nepa_b_release nepa-base-patch14-224
    deepspeed pretrain_nepa.py --recipe nepa_b_release --init_from nepa_b_start ...

A checkpoint is a folder such as OUTPUT_DIR/checkpoints/step_00001000, or an OUTPUT_DIR for its newest; any grid may
have written it. Where it holds the weight average (ema) as well as the raw weights, --weights raw takes the latter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_nepa.cli import path_argument
from megatron_nepa.config import require
from megatron_nepa.terminal import tool

Command = Callable[[argparse.Namespace], int]

# each command imports what it needs itself: --help and a mistake in the flags do not wait for torch


def to_release(args: argparse.Namespace) -> int:
    """Write config.json, preprocessor_config.json and model.safetensors as the authors' code reads them."""
    from megatron_nepa.checkpoint.conversion.release_folder import write_release
    from megatron_nepa.checkpoint.reading.weights import read_weights
    from megatron_nepa.export.preprocessor import PREPROCESSOR_FILE, release_preprocessor
    from megatron_nepa.export.run_facts import read_facts

    weights = read_weights(args.source, args.weights)
    classes = read_facts(args.source, args.weights).classes
    files = {PREPROCESSOR_FILE: release_preprocessor(weights.model)}
    _say(weights.origin, args.target, write_release(weights, args.target, args.fold_layer_scale, classes, files))
    return 0


def from_release(args: argparse.Namespace) -> int:
    """Write a checkpoint for --init_from from model.safetensors (raw) or pytorch_model_ema.bin (ema)."""
    from megatron_nepa.checkpoint.conversion.release_folder import read_release
    from megatron_nepa.checkpoint.reading.weights import write_weights

    weights, notes = read_release(args.source, args.weights, args.fold_layer_scale)
    write_weights(weights, args.target)
    _say(weights.origin, args.target, notes)
    return 0


def to_hf(args: argparse.Namespace) -> int:
    """Write a folder that Hugging Face transformers loads, with the model's source and a model card."""
    from megatron_nepa.checkpoint.conversion.compare import read_any
    from megatron_nepa.export.huggingface import write_huggingface
    from megatron_nepa.export.run_facts import read_facts

    weights = read_any(args.source, args.weights)
    facts = read_facts(args.source, args.weights)
    _say(weights.origin, args.target, write_huggingface(weights, facts, args.target))
    return 0


def from_hf(args: argparse.Namespace) -> int:
    """Write a checkpoint for --init_from from such a folder; its code is not run."""
    from megatron_nepa.checkpoint.conversion.huggingface_folder import read_huggingface
    from megatron_nepa.checkpoint.reading.weights import write_weights

    weights = read_huggingface(args.source)
    write_weights(weights, args.target)
    _say(weights.origin, args.target, [])
    return 0


def to_timm(args: argparse.Namespace) -> int:
    """Write a folder that timm.create_model("local-dir:TARGET", pretrained=True) loads."""
    from megatron_nepa.checkpoint.conversion.compare import read_any
    from megatron_nepa.export.run_facts import read_facts
    from megatron_nepa.export.timm_folder import write_timm

    weights = read_any(args.source, args.weights)
    facts = read_facts(args.source, args.weights)
    _say(weights.origin, args.target, write_timm(weights, facts, args.target, args.stock))
    return 0


def to_graph(args: argparse.Namespace) -> int:
    """Write a graph for other runtimes, .onnx or .pt2 by the target's name, and compare what it computes."""
    from megatron_nepa.checkpoint.conversion.compare import read_any
    from megatron_nepa.export.graph import require_onnx, write_graph
    from megatron_nepa.export.run_facts import read_facts

    if args.target.suffix == ".onnx":
        require_onnx()
    weights = read_any(args.source, args.weights)
    facts = read_facts(args.source, args.weights)
    _say(weights.origin, args.target, write_graph(weights, facts, args.target, args.output, args.image_size))
    return 0


def consolidate_weights(args: argparse.Namespace) -> int:
    """Write the weights as one fp32 safetensors file under this project's names."""
    from megatron_nepa.checkpoint.reading.weights import consolidate, read_weights

    weights = read_weights(args.source, args.weights)
    consolidate(weights, args.target)
    _say(weights.origin, args.target, [])
    return 0


def universal(args: argparse.Namespace) -> int:
    """Export to DeepSpeed's universal layout; a SOURCE of that layout is imported."""
    from megatron_nepa.checkpoint.conversion.universal import export_universal, import_universal, is_universal

    if is_universal(args.source):
        print(f"{args.target}: {import_universal(args.source, args.target)}")
    else:
        print(f"{args.target}: {export_universal(args.source, args.target)}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds: step, grid, tensors, model."""
    from megatron_nepa.checkpoint.conversion.inspect import describe

    print(describe(args.source))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints of either format: tensors, and outputs on photographs; status 1 if they differ."""
    from megatron_nepa.checkpoint.conversion.compare import compare

    require(args.tolerance >= 0, f"--tolerance is {args.tolerance}; it must not be negative.")
    found = compare(args.first, args.second, args.weights)
    differences = found.differences(args.tolerance)
    losses = ["", ""] if found.losses is None else [f"loss {loss:.9f}  " for loss in found.losses]
    for name, loss, origin in zip("AB", losses, found.origins, strict=True):
        print(f"{name}  {loss}{origin}")
    compared = f"{len(found.tensors)} tensors{', losses' if any(losses) else ''} and {found.output}s"
    print(
        f"compared {compared} (largest difference "
        f"{found.largest_difference:.3g}, largest value {found.largest_value:.3g}, tolerance {args.tolerance:.3g}): "
        f"{'they differ' if differences else 'the same'}"
    )
    for left in found.left_out:
        print(f"  left out: {left}")
    for difference in differences:
        print(f"  {difference}")
    return 1 if differences else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, *paths: str) -> argparse.ArgumentParser:
        help_text = (command.__doc__ or "").strip()
        added = commands.add_parser(name, help=help_text, description=help_text)
        for path in paths:
            added.add_argument(path, type=path_argument)
        added.set_defaults(command=command)
        return added

    converters = [
        add("to_release", to_release, "source", "target"),
        add("from_release", from_release, "source", "target"),
    ]
    for converter in converters:
        converter.add_argument(
            "--fold_layer_scale",
            action="store_true",
            help="multiply LayerScale into the layers before it: the same function without it",
        )
    exporters = [add("to_hf", to_hf, "source", "target"), add("to_timm", to_timm, "source", "target")]
    exporters.append(add("to_onnx", to_graph, "source", "target"))
    exporters[2].add_argument("--output", choices=["features", "classes", "masks"], help="default: what the head gives")
    exporters[2].add_argument("--image_size", type=int, help="side of the images (default: the model's)")
    exporters[1].add_argument(
        "--stock",
        action="store_true",
        help="for timm's own class: bidirectional models without a head on the last token",
    )
    add("from_hf", from_hf, "source", "target")
    add("inspect", inspect, "source")
    add("universal", universal, "source", "target")
    comparison = add("verify", verify, "first", "second")
    comparison.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of an element (1e-4)")
    for weighted in (*converters, *exporters, add("consolidate", consolidate_weights, "source", "target"), comparison):
        weighted.add_argument("--weights", choices=["ema", "raw"], help="default: ema where there is one")
    return parser.parse_args(arguments)


def main() -> None:
    """Run one command."""
    args = parse_arguments()
    sys.exit(args.command(args))


def _say(origin: str, target: Path, notes: list[str]) -> None:
    print(f"{target}: {origin}")
    for note in notes:
        print(f"  {note}")


if __name__ == "__main__":
    with tool("convert_checkpoint"):
        main()
