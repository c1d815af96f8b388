"""Datasets by their string: a folder's path, or `Name:key=value:key=value`."""

from dinov2cli.data.datasets.base import UNLABELLED, ImageDataset
from dinov2cli.data.datasets.strings import check_dataset, make_dataset
from dinov2cli.data.decoding import UnreadableImage

__all__ = ["UNLABELLED", "ImageDataset", "UnreadableImage", "check_dataset", "make_dataset"]
