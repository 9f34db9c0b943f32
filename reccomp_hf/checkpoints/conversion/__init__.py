"""The parts of a conversion: what is planned, what must fit, how weights are copied, and what is proven."""
