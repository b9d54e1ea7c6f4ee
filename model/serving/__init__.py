"""Answers requests: encode, fuse, score, choose the best items, explain."""
