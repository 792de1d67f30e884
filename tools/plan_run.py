"""Plan a run on a cluster that you have not used yet: what fits, how fast it will be, what it will cost.

    python tools/plan_run.py --recipe nepa_7b --gpus 512
    python tools/plan_run.py --recipe nepa_7b --gpus 512 --json > plans.json
    python tools/plan_run.py --recipe nepa_7b --gpus 512 --plot nepa_7b.png       # images/s from 8 to 4,096 GPUs
    python tools/plan_run.py --recipe nepa_7b --gpus 1024 --dry_run               # count a step of the best plan
    python tools/plan_run.py --validate                                           # beside published runs

It tries every layout of a grid (tensor-parallel size 1 to 8, sequence parallelism, ZeRO 1 and 2, micro-batch,
activation checkpointing) and prints the best first:

    TP, SP       tensor-parallel ranks of a replica; whether they share its token rows
    micro, x     images of a forward pass, and how many of those an optimizer step accumulates
    ckpt         what blocks compute again in the backward pass, to keep less: nothing, what is cheap, everything
    GB           of one GPU at its peak, in bf16; "fits" compares it with what the part can give to a run
    MFU          model FLOP/s over the GPUs' dense bf16 peak; computing blocks again lowers it
    images/s     "<" marks a bound only: the kernels are so short that the host launches them more slowly
    waits        share of the step in which a GPU waits for others

Reading it. A replica that fits on one GPU rarely gains from tensor parallelism: it is for models that do not, and for
more GPUs than the batch has micro-batches. More micro-batches a step cost ZeRO 2 a reduction of all gradients each;
ZeRO 1 reduces once, and keeps 6 bytes a parameter more. Where "waits" is large, fewer GPUs are cheaper.

How far to trust it. Memory and collectives are counted: --dry_run runs the real model and DeepSpeed on tensors without
memory, for any number of ranks, and prints both. Time is a roofline: the best matrix products that were measured on
the part, everything else at the data sheet's bandwidth, NCCL's own latencies. It leaves out the host's work for each
kernel, slow ranks, the data and the file system, so it is the best case: --validate says how far from
published runs. NVIDIA's own ViT-g runs reached 52 to 66 % of it, a compiled ViT-L on an H200 65 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from megatron_nepa.cli import path_argument
from megatron_nepa.config import PretrainingConfig, require
from megatron_nepa.planning.cluster import GPUS, Gpu
from megatron_nepa.planning.plan import Plan, find_plans
from megatron_nepa.planning.report import format_details, format_table, heading, to_dict
from megatron_nepa.planning.requirements import requirements
from megatron_nepa.planning.validation import IMAGENET_IMAGES, format_validation, validate
from megatron_nepa.recipes import PRETRAINING_RECIPES
from megatron_nepa.terminal import tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="nepa_b", help=f"one of {', '.join(PRETRAINING_RECIPES)} (nepa_b)")
    parser.add_argument("--gpus", type=int, default=8, help="in nodes of eight (8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (h100)")
    parser.add_argument("--global_batch_size", type=int, help="images of a step (the recipe's)")
    parser.add_argument(
        "--num_images", type=int, default=IMAGENET_IMAGES, help="of all sources of the data (1,281,167: ImageNet)"
    )
    parser.add_argument("--top", type=int, default=10, help="plans that are printed (10)")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON, in bytes and seconds")
    parser.add_argument("--plot", type=path_argument, metavar="FILE.png", help="draw images/s from 8 to 4,096 GPUs")
    parser.add_argument("--dry_run", action="store_true", help="count memory and collectives of the best plan's step")
    parser.add_argument("--validate", action="store_true", help="print predictions beside published runs, and end")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Plan, and print."""
    args = parse_arguments(arguments)
    if args.validate:
        print(format_validation(validate()))
        return
    run, gpu = read_run(args), read_gpu(args.gpu)
    require(not (args.json and args.dry_run), "--dry_run prints a table, not JSON: give one of them.")
    require(args.plot is None or not args.plot.exists(), f"--plot {args.plot} exists; remove it or name another file.")
    plans = find_plans(run, args.gpus, gpu)
    shown = plans[: args.top]
    needs = [requirements(run, plan, args.num_images) for plan in shown]
    if args.json:
        print(json.dumps([to_dict(run, plan, need) for plan, need in zip(shown, needs, strict=True)], indent=1))
    else:
        print(heading(run, args.gpus, gpu), format_table(shown, needs), sep="\n\n")
        if plans[0].fits:
            print("", format_details(run, plans[0], needs[0], gpu), sep="\n")
        else:
            print(f"\nNothing fits into {gpu.memory_bytes / 1e9:.0f} GB; the smallest is first. Take more GPUs.")
    if args.plot is not None:
        from megatron_nepa.planning.figure import draw_scaling

        draw_scaling(run, gpu, args.plot)
        print(f"drew {args.plot}", file=sys.stderr)
    if args.dry_run:
        print_dry_run(run, plans[0])


def read_run(args: argparse.Namespace) -> PretrainingConfig:
    """The recipe with the command line's batch."""
    require(
        args.recipe in PRETRAINING_RECIPES,
        f"--recipe {args.recipe} is unknown; there are {', '.join(PRETRAINING_RECIPES)}.",
    )
    for name in ("num_images", "top"):
        require(getattr(args, name) >= 1, f"--{name} is {getattr(args, name)}; it must be at least 1.")
    run = PRETRAINING_RECIPES[args.recipe]()
    return run if args.global_batch_size is None else replace(run, global_batch_size=args.global_batch_size)


def read_gpu(name: str) -> Gpu:
    """The GPU of that name."""
    require(name in GPUS, f"--gpu {name} is unknown; there are {', '.join(GPUS)}.")
    return GPUS[name]


def print_dry_run(run: PretrainingConfig, plan: Plan) -> None:
    """Count a step of ``plan`` and print the counts beside the formulas."""
    from megatron_nepa.planning.dry_run import compare, dry_run

    print(f"\nDry run of {plan.layout.describe()} on {plan.layout.gpus} ranks, counted:", flush=True)
    print(compare(plan, dry_run(run, plan.layout)))


if __name__ == "__main__":
    with tool("plan_run"):
        main()
