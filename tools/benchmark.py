"""Benchmarks of this machine.

python tools/benchmark.py kernels [--recipe nepa_b] [--operations swiglu,attention] [--json]
python tools/benchmark.py data [--data DIR] [--threads 2] [--rounds 9] [--json]
"""

import argparse

from megatron_nepa.benchmarks import data, kernels
from megatron_nepa.config import ConfigError

SUBJECTS = {"kernels": kernels, "data": data}


def main() -> None:
    """Hand over to the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="subject", required=True)
    for name, module in SUBJECTS.items():
        module.add_arguments(subparsers.add_parser(name, help=module.__doc__))
    options = parser.parse_args()
    SUBJECTS[options.subject].run(options)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"benchmark: {error}") from None
