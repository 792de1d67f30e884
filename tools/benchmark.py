"""Benchmarks of this machine.

python tools/benchmark.py kernels [--recipe nepa_b] [--operations swiglu,attention] [--json]
python tools/benchmark.py data [--data DIR] [--threads 2] [--rounds 9] [--json]
python tools/benchmark.py forms [--threads 2] [--rounds 15] [--json]
python tools/benchmark.py order [--batch 256] [--json]
python tools/benchmark.py index [--batches 10000] [--json]
python tools/benchmark.py remote [--delays 0,30] [--batch 64] [--json]
python tools/benchmark.py start [--rounds 5] [--json]
python tools/benchmark.py train [--recipe nepa_b_release] [--micro_batch_size 8] [--baseline] [--json FILE]
python tools/benchmark.py suite [--only cpu_b,cpu_data]
"""

import argparse
import importlib
import sys

from megatron_nepa.terminal import tool

# module below megatron_nepa.benchmarks and what it measures; only the one that is asked for is imported, since each
# needs packages that the others do not
SUBJECTS = {
    "kernels": ("kernels", "time the fused operations against their contenders"),
    "data": ("data", "time the decoding of images"),
    "forms": ("forms", "time the decoding of the same images in tar, Arrow and parquet files"),
    "order": ("order", "time which images a batch shows"),
    "index": ("index", "time the opening of an index and the images that it serves"),
    "remote": ("remote", "time the images of shards behind a web server"),
    "start": ("start", "measure what a rank computes and opens before its first step"),
    "train": ("train.comparison", "time training steps"),
    "suite": ("suite", "time what tools/RESULTS.md reports"),
}


def main(arguments: list[str]) -> None:
    """Hand over to the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="subject", required=True)
    flags = {name: subparsers.add_parser(name, help=purpose) for name, (_, purpose) in SUBJECTS.items()}
    asked = arguments[0] if arguments else ""
    if asked not in SUBJECTS:
        parser.parse_args(arguments)  # helps, or says what is wrong
        return
    module = importlib.import_module(f"megatron_nepa.benchmarks.{SUBJECTS[asked][0]}")
    flags[asked].description = module.__doc__
    module.add_arguments(flags[asked])
    options, others = parser.parse_known_args(arguments)
    if asked == "train":
        module.run(options, others)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    module.run(options)


if __name__ == "__main__":
    with tool("benchmark"):
        main(sys.argv[1:])
