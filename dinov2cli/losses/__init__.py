"""The terms of DINOv2's objective and the centering of the teacher's scores."""

from dinov2cli.losses.centering import SinkhornKnoppCentering, SoftmaxCentering, sinkhorn_knopp
from dinov2cli.losses.cross_entropy import DINOLoss, DINOTerm, iBOTPatchLoss, iBOTTerm
from dinov2cli.losses.distillation import DistilledDINOTerm, DistilledIBOTTerm
from dinov2cli.losses.gram import GramLoss, GramTerm
from dinov2cli.losses.koleo import KoLeoLoss, KoLeoTerm
from dinov2cli.losses.term import LossTerm

__all__ = ["DINOLoss", "DINOTerm", "DistilledDINOTerm", "DistilledIBOTTerm", "GramLoss", "GramTerm", "KoLeoLoss",
           "KoLeoTerm", "LossTerm", "SinkhornKnoppCentering", "SoftmaxCentering", "iBOTPatchLoss", "iBOTTerm",
           "sinkhorn_knopp"]  # fmt: skip
