"""Triton's kernels run in its interpreter on the CPU; Triton wants to know before it is first imported.

``make test-gpu`` sets TRITON_INTERPRET=0 and runs ``tests/gpu`` in a process of its own, with compiled kernels.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
