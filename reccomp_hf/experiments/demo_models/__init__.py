"""Training of the demo checkpoints; `python -m reccomp_hf.experiments.demo_models.train` runs it."""
