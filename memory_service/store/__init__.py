"""Redis: keys, records, connections, the embedded server, and what Redis tells of changes and replicas."""
