"""The benchmarks of `eval.bench.preset`: what one GPU does with models of published shapes and random weights."""
