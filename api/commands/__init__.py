"""What the commands of `ramrec` do on the user's side: the tour, `serve`, `inspect`."""
