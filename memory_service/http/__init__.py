"""The memory service over HTTP: routes, probes, middleware, metrics and the OpenAPI document."""
