"""What answers a request: encode, fuse, score, choose the best items, explain."""
