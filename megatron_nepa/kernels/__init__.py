"""The memory-bound operations of a NEPA block; ``dispatch.select_kernels`` picks the implementations of a run."""
