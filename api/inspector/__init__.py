"""The inspector page and its files."""
