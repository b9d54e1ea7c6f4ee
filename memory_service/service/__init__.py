"""The use cases, and what belongs to one model."""
