"""Data files: rows, images and prompts."""
