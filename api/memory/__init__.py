"""The memory service as the api sees it: any number of replicas."""
