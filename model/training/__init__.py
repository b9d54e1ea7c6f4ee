"""Fitting a model in two stages, and measuring it: replay of a log, evaluation, metrics."""
