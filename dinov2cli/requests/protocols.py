"""The table of evaluation protocols: what may follow `dino2 eval`, or stand in `evaluation.tasks`.

A new one is a module of `dinov2cli.eval` with `run(request, subject=None)`, its request, and its name here.
"""

from dinov2cli.requests.dense import DepthRequest, SegmentationRequest
from dinov2cli.requests.eval import EvalRequest, KnnRequest, LinearRequest, LogregRequest
from dinov2cli.requests.retrieval import RetrievalRequest

EVALUATIONS: dict[str, type[EvalRequest]] = {
    it.protocol(): it
    for it in (KnnRequest, LogregRequest, LinearRequest, RetrievalRequest, SegmentationRequest, DepthRequest)
}
