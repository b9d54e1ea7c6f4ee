"""Any number of memory replicas over one Redis, as real processes: what a request costs however many there are, and how
long it takes until callers no longer notice that one joined, one left, or something was written.

    python -m benchmarks.memory.replicas [PART …] [--users N] [--entries N …] [--seconds S] [--json FILE]

Where there are fewer cores than memory replicas, throughput follows from CPU: n replicas with a core each answer n
requests in the CPU time (of all of them together, from /proc) that one request takes. For this they are asked one after
another, on a core of their own; all at once, they would push each other out of the caches. Deployments are compared by
turns, each with a Valkey of its own. Results: benchmarks/memory/replicas.json.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are loaded, also in child processes
