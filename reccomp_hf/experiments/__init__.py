"""How published numbers were made. Not part of the installed package."""
