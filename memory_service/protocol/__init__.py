"""What api and memory service share: the messages between them, Redis Cluster slots, logs and traces."""
