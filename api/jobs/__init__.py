"""Jobs over many users: sending a log, recommending for everyone, moving everyone to another model."""
