"""Experiments behind the published numbers. Not part of the installed package: run them from a checkout."""
