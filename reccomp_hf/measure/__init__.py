"""Measuring a model: answers, time, and estimated cost."""
