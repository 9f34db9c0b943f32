"""Accuracy of every method over the number of visual tokens, down to four, on the demo models' held-out scenes."""
