"""Bodies of requests and responses, by subject. A request with an unknown field or a value out of bounds is a 422."""
