"""Indexes of features: alike images of a picture, a folder or another index."""
