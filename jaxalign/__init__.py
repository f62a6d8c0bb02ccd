"""Inference-time alignment of language models as pure, jit-able JAX functions."""
