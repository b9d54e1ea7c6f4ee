"""The collective index: the memories of all users, searchable at once through FAISS.

Each entry is filed in the inverted list of the item that its user took just before; a long list is split into branches
by the item before that. A query searches the lists of its user's last items and of the items that tend to follow them,
the most promising lists first, up to a budget of entries. So nothing is trained, and the time to find lists does not
grow with the number of entries. Keys are stored as codes of 4 or 8 bits a dimension: see `benchmarks/memory/lists.md`.

A change is visible to the next search, and a dropped entry is gone. Results never say whose an entry is. Evaluation and
the memory service use the same index. FAISS does not detect concurrent changes: use an index from one thread only.
"""

import os

# This must happen before FAISS is loaded: a forked child hangs if OpenMP runs two threads. Training may set more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
