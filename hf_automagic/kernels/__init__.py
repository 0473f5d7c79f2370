"""Backends: the default chain as a few launches over all tensors, and stacks compiled to one graph each."""
