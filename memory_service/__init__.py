"""The users' memory banks as a service: FAISS for search, Redis for truth. Never imports torch."""

import os

# Before faiss is imported anywhere: two OpenMP threads hang a forked child, and searches here are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
