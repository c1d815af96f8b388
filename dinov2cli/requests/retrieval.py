"""What the evaluation by retrieval may be asked for."""

from dinov2cli.files import user_path
from dinov2cli.requests.base import AtLeastOne, option
from dinov2cli.requests.eval import EvalRequest


class RetrievalRequest(EvalRequest, command="eval retrieval"):
    """Rank images by the cosine of their features, and measure mAP and recall@k.

    Each val image queries the train images, and those of its class are to come first; where both are the same images,
    each queries the others. With --val-dataset FOLDER of Revisited Oxford or Paris (gnd_roxford5k.pkl and jpg/), its
    queries rank its database: easy, medium and hard.

    Example:

        dino2 eval retrieval runs/demo --train-dataset photos/train --val-dataset photos/val

        dino2 eval retrieval dinov2_vits14 --val-dataset /data/roxford5k --whole
    """

    recall_at: tuple[AtLeastOne, ...] = option(
        (1, 5, 10), "k of recall@k, and of the precision@k of Revisited [1 5 10].", default_text=False
    )
    whole: bool = option(
        False, "Fit the long side to the image size and pad with black; by default the centre crop of k-NN."
    )
    query_boxes: bool = option(False, "Of Revisited: cut queries to the boxes of their buildings.")
    batch_size: AtLeastOne = option(256, "Images at a time.")

    @property
    def trains(self) -> bool:
        return not self.is_revisited

    @property
    def is_revisited(self) -> bool:
        """Whether val is a folder of Revisited Oxford or Paris."""
        return self.val_dataset is not None and any(user_path(self.val_dataset).glob("gnd_*.pkl"))
