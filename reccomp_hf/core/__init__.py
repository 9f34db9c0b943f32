"""The code that a checkpoint carries: configuration, methods, models and processors."""
