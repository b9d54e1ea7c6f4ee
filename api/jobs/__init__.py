"""Work on many users at once: a whole log, everybody's list, another model for all."""
