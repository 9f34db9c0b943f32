"""How the demo checkpoints are trained; `python -m reccomp_hf.experiments.demo_models.train` runs it."""
