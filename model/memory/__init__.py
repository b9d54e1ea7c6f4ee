"""Memories: the rules, banks and records of users, and the collective index. No torch, no I/O."""
