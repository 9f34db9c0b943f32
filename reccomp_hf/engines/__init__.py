"""Ways to run a compressed model: batch prediction, servers, other engines and trainers."""
