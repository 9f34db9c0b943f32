"""Speed and growth of the choice of tokens."""
