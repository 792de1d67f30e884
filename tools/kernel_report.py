"""Compile every Triton kernel without a GPU and report registers, spills, vector access and bytes.

    python tools/kernel_report.py --arch sm_80,sm_90 [--recipe nepa_b,nepa_l,nepa_7b] [--json]

Exits with 1 when a kernel spills, touches local memory, is not vectorised or moves more bytes than it should.
"""

from megatron_nepa.kernels.proofs.report import main
from megatron_nepa.terminal import tool

if __name__ == "__main__":
    with tool("kernel_report"):
        raise SystemExit(main())
