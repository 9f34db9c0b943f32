"""The page of `reccomp-hf app`: a picture, a conversation about it, and the tokens that were read."""
