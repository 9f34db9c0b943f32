"""`python -m reccomp_hf`, the same as `reccomp-hf`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
