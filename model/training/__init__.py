"""Trains a model in two stages, and evaluates it: replay of a log, metrics."""
