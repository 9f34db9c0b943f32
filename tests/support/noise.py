"""Inputs of noise for the tiny models."""

from reccomp_hf.measure.benchmark.batches import noise_batch

PICTURE = (70, 50)  # pixels, for LLaVA-NeXT


def noise_inputs(model, size=2, **kwargs):
    return noise_batch(model, size, PICTURE, text_tokens=12, question_tokens=5, **kwargs)
