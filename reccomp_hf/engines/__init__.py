"""Ways to run a model besides a Python call: HTTP, batch files, and other inference engines."""
