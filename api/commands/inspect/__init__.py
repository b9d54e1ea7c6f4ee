"""`ramrec inspect`: what a running service remembers about a user, asked over the REST API."""
