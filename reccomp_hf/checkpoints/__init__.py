"""Making, checking, describing, loading and publishing checkpoints."""
