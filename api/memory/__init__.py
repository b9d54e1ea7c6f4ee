"""The memory service as the api sees it: one replica, or a group of them."""
