"""``python -m benchmarks.gpu_check``: checks and measures everything that needs a GPU, the most valuable results first.

    plan.py          the steps: what runs, in which order, with which time limits
    processes.py     runs a step's processes; each has a process group, which is killed at its time limit
    journal.py       results.jsonl: one line per result, written as soon as it is known
    workers.py       the code of these processes: canaries, timings, and the tile sweep of benchmarks/tile_sweep.py
    pytest_rows.py   a pytest plugin that writes each test's outcome to the journal
    summary.py       makes report.md, the CSV files and the archive from the journal

A process that crashes, hangs, or breaks the GPU's state costs one result. An interrupted run keeps its results, and
``--report DIR`` then makes its report. Without a GPU, everything runs small on the CPU, which tests the check itself.
"""
