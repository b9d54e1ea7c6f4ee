"""The use case behind `POST /recommend`."""
