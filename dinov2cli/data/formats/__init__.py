"""Readers of image files, one module a family: bytes to samples as stored, with what the file says of them."""
