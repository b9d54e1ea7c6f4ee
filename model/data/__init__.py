"""Logs of interactions: reading them, and turning them into sequences. No torch."""
