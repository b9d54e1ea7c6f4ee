"""The REST API: routes, schemas, errors, middleware, the OpenAPI document."""
