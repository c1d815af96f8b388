"""Curation of a collection: near-duplicates, what is near an evaluation set, what is near a seed set, balance."""
