"""Benchmarks of this machine.

python tools/benchmark.py kernels [--recipe nepa_b] [--operations swiglu,attention] [--json]
python tools/benchmark.py data [--data DIR] [--threads 2] [--rounds 9] [--json]
python tools/benchmark.py train [--recipe nepa_b_release] [--micro_batch_size 8] [--baseline] [--json FILE]
python tools/benchmark.py suite [--only cpu_b,cpu_data]
"""

import argparse

from megatron_nepa.benchmarks import data, kernels, suite
from megatron_nepa.benchmarks.train import comparison as train
from megatron_nepa.config import ConfigError

SUBJECTS = {"kernels": kernels, "data": data, "train": train, "suite": suite}


def main() -> None:
    """Hand over to the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="subject", required=True)
    for name, module in SUBJECTS.items():
        module.add_arguments(subparsers.add_parser(name, help=module.__doc__))
    options, others = parser.parse_known_args()
    if options.subject == "train":
        train.run(options, others)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    SUBJECTS[options.subject].run(options)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"benchmark: {error}") from None
