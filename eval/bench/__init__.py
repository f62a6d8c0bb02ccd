"""Benchmarks: each runs the alternative beside ours in one process and prints the ratio."""
