"""A server with OpenAI's interface, on transformers' own server parts; `reccomp-hf serve` runs it."""
