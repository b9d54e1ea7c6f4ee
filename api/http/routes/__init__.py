"""The routes, by subject. Each declares its scope, its errors and an example of its response (`api.http.policy`)."""
