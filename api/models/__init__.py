"""The models that the api has loaded, and the passage from one to the next."""
