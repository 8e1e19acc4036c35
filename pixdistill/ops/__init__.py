"""Fused primitives, a folder each: contract and dispatch, dense reference, streaming PyTorch, Triton."""
