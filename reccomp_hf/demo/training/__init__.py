"""How the demo checkpoints are trained; `python -m reccomp_hf.demo.train` runs it."""
