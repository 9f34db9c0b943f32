"""Other programs that run these models; each needs that program installed, and none is imported with the package."""
