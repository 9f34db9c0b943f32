"""Other engines that read the checkpoints; nothing here is imported before its engine asks for it."""
