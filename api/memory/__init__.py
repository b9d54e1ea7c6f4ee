"""The memory service as the api calls it: the port (`port`) and what implements it."""
