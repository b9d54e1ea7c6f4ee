"""What callers see: the REST API and the command line."""
