"""The use case behind `POST /memories`."""
