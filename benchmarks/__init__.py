"""Speed and memory of the losses, side by side.

``pytest benchmarks`` runs the pytest-benchmark suite; ``python -m benchmarks.compare`` alternates the providers over a
sweep and adds rows to a CSV file; ``python -m benchmarks.report`` makes a page with figures of such files; ``python -m
benchmarks.gpu_check`` is both, with the tests that need a GPU. All take what is computed from :mod:`benchmarks.problems`,
who computes it from :mod:`benchmarks.providers` and how to measure it from :mod:`benchmarks.measure`. To measure one more
implementation, enter it in ``providers.PROVIDERS``.
"""
