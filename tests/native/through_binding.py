"""A pytest plugin: CPU tensors go through the binding and kernel of $SENSIBERT_TEST_BINDING, not the reference."""

import os

import torch

torch.ops.load_library(os.environ["SENSIBERT_TEST_BINDING"])
