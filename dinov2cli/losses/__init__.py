"""The terms of DINOv2's objective and the centering of the teacher's scores."""

from dinov2cli.losses.centering import SinkhornKnoppCentering, SoftmaxCentering, sinkhorn_knopp
from dinov2cli.losses.cross_entropy import DINOLoss, iBOTPatchLoss
from dinov2cli.losses.koleo import KoLeoLoss

__all__ = [
    "DINOLoss",
    "KoLeoLoss",
    "SinkhornKnoppCentering",
    "SoftmaxCentering",
    "iBOTPatchLoss",
    "sinkhorn_knopp",
]
