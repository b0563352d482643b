"""LiFT's evaluation-mode forward pass: one operator that runs a plan composed from the network's weights."""
