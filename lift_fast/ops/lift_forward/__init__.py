"""LiFT's evaluation-mode forward pass: one operator that executes a plan composed from the network's weights."""
