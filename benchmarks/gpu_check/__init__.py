"""``python -m benchmarks.gpu_check``: all that a machine with a GPU should show, the most valuable answers first.

    plan.py          the steps: what runs, in which order, with which time limits
    processes.py     runs a step's processes, each in a group that is killed whole at its limit
    journal.py       results.jsonl: a line for each result, written the moment it is known
    workers.py       what runs in those processes: canaries, timings, the sweep over tiles of benchmarks/tile_sweep.py
    pytest_rows.py   a plugin of pytest that writes each test's outcome into the journal
    summary.py       report.md, the CSV files and the archive, made from the journal alone

A process that crashes, hangs, or leaves the GPU in an error costs one result and no other. A run that is cut off keeps what it
has, and ``--report DIR`` makes the report of it afterwards. On a machine without a GPU all of it runs against a stand-in, the
CPU: small, and to show that the check itself works.
"""
