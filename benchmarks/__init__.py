"""Speed and memory of the losses, side by side.

``pytest benchmarks`` runs the pytest-benchmark suite; ``python -m benchmarks.compare`` alternates the providers in one
run and prints the ratios that the project's targets are about. Both take what to run from :mod:`benchmarks.providers`
and how to measure it from :mod:`benchmarks.measure`. To measure one more implementation, enter it in
``providers.PROVIDERS``.
"""
