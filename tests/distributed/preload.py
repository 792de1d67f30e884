"""Imported once by the server that ranks are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imported by every engine, in 2 s
import torch
import torch.distributed.checkpoint

import megatron_nepa.training.engine.engine  # noqa: F401

torch.set_num_threads(1)
