"""The memory service without HTTP: its use cases and what they are made of."""
