"""Triton kernels, installed as ``lift_fast.kernels``: one file per operator, kernels first, then their launcher."""
