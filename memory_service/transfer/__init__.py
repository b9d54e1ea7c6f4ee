"""Moves users' memories from one deployment to another, as a file of JSON lines (`lines`)."""
