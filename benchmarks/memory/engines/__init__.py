"""One engine each: the same keys in, the same queries, in a process and a virtual environment of its own."""
