"""What api and memory service share: messages, their checks and bounds, the call context, hash slots, logs, traces."""
