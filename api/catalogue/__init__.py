"""The items: numbers and ids, metadata, filters."""
