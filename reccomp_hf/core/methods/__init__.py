"""One file per method of choosing visual tokens, their contract and their registry."""
