"""The item catalogue: numbers and ids, metadata, filters."""
