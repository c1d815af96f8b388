"""Evaluation of frozen features by the published protocols: `requests.protocols` lists them."""
