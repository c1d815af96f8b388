"""Writes the metadata through which the ImageNet datasets are read, in the reference implementation's formats."""
