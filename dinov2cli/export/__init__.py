"""Exports: the same weights for other ecosystems, each opened there and compared before it counts as done."""
