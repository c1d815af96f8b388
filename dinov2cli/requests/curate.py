"""What may be asked of a curation: `dino2 curate`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov2cli.requests.base import AtLeastOne, argument, option
from dinov2cli.requests.eval import RESIZE_RATIO, FeaturesRequest, OneOrSeveral

Cosine = Annotated[float, Field(ge=-1, le=1)]


class CurateRequest(
    FeaturesRequest,
    command="curate",
    run_by="dinov2cli.curate.curation:run",
    launched_by="dinov2cli.launch.local:launch_here",
    checked_by="dinov2cli.curate.curation:look",
):
    """Clean and balance a collection of images, as a list to train on.

    In this order, each where it is asked for: near-duplicates are dropped but for one of each kind; images near an
    evaluation set (--against) are dropped; images near a set of good ones (--like) are kept alone; and so many are
    drawn evenly from all kinds of images (--sample). OUT gets list.txt, for `--data list:OUT/list.txt`, report.html
    with pictures of what was dropped and why, report.json, dropped.csv, and work/, by which the same command goes on
    where it was, and one with other thresholds begins where they matter. See docs/curate.md.

    Thresholds are cosines of features. The defaults are the paper's, for features of a network that was trained to find
    copies; with a model like DINOv2 they are too low: look at the report, or give --duplicates 0.95.

    Example:

        dino2 curate photos-curated --data ~/photos --model runs/demo --duplicates 0.95

        dino2 curate curated --data ~/photos --model runs/demo --duplicates 0.95 --against photos/val --sample 5000

        dino2 curate web-curated --data web.safetensors --model dinov2_vits14 --like birds --dry-run
    """

    output: Path = argument("The folder to write.", metavar="OUT", default_text=False)
    data: OneOrSeveral = option(
        ...,
        "The images: files, a folder, a dataset string; or their features: an index of dino2 search, or what dino2 "
        "embed has written as .safetensors, .parquet or .npy.",
        metavar="DATASET",
    )
    model: str | None = option(
        None, "Makes the features: a run folder, a weights file, a URL or a released name.", metavar="CKPT"
    )
    images: str | None = option(
        None, "The images whose features --data holds, where it names no files: a .npy, members of shards.",
        metavar="DATASET",
    )  # fmt: skip
    duplicates: Cosine = option(0.6, "Cosine above which two images are near-duplicates.", metavar="COSINE")
    keep_duplicates: bool = option(False, "Look for no near-duplicates.")
    keep: Literal["largest", "first"] = option(
        "largest", "Which of several near-duplicates stays: that of most pixels, then of most bytes; or the first."
    )
    neighbours: AtLeastOne = option(64, "Nearest images that each is compared with.")
    probes: int | None = option(
        None,
        "Look for these among the images of so many nearest cells of 4 sqrt(N); 0: among all. The report measures what "
        "is missed.",
        default_text="0, above 200,000 images 8",
        ge=0,
    )
    against: OneOrSeveral = option(
        (), "Evaluation sets, likewise images or features: drop what is near them.", metavar="DATASET"
    )
    against_threshold: Cosine = option(0.45, "Cosine above which an image is near an evaluation set.", metavar="COSINE")
    like: OneOrSeveral = option((), "Sets of good images, likewise: keep only what is near them.", metavar="DATASET")
    retrieval: Literal["auto", "neighbours", "clusters"] = option(
        "auto",
        "What is near such a set: the nearest to each of its images; or clusters that hold several of them. auto: the "
        "first for sets of over a million.",
    )
    per_query: AtLeastOne = option(4, "neighbours: images for each of the set; the paper takes 4, or 32.")
    pool_clusters: AtLeastOne | None = option(
        None, "clusters: into how many to divide the images.", default_text="4 sqrt(N), at most 100,000"
    )
    hits: int = option(3, "clusters: take those that hold more than so many of the set.", ge=0)
    per_cluster: AtLeastOne = option(10_000, "clusters: images of each, drawn at random.")
    at_most: AtLeastOne = option(1_000_000, "clusters: images for a set.")
    sample: AtLeastOne | None = option(None, "Draw so many images, evenly from clusters of clusters.", metavar="N")
    clusters: tuple[AtLeastOne, ...] = option(
        (), "sample: clusters of each level, each fewer than before.", metavar="K", default_text="4 sqrt(N), and fewer"
    )
    resamplings: int = option(2, "sample: how often centres are fitted again to what is closest to them.", ge=0)
    iterations: AtLeastOne = option(20, "Of k-means, at most.")
    seed: int = option(0, "Of all that is drawn at random.", ge=0)
    config_file: Path | None = option(None, "Configuration instead of the run's own.", metavar="YAML")
    batch_size: AtLeastOne = option(256, "Images at a time.", flags="--batch-size --batch_size")
    resize_ratio: float = RESIZE_RATIO
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    gpus: AtLeastOne | None = option(
        None, "Processes of this machine, each on a GPU of its own (or --device cpu) [1].", metavar="N", last=True
    )
    dry_run: bool = option(False, "Check everything, and print the plan with time, memory and disk.", last=True)
    as_json: bool = option(False, "Print one JSON object.", flags="--json", last=True)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.keep_duplicates and not (self.against or self.like or self.sample):
            raise ValueError("--keep-duplicates leaves nothing to do: give --against, --like or --sample, too")
        given = self.model_fields_set
        for names, option_, there in (
            (("duplicates", "keep"), "--keep-duplicates", not self.keep_duplicates),
            (("against_threshold",), "--against", self.against),
            (("retrieval", "per_query", "pool_clusters", "hits", "per_cluster", "at_most"), "--like", self.like),
            (("clusters", "resamplings"), "--sample", self.sample),
        ):
            if (wrong := [name for name in names if name in given]) and not there:
                what = f"--{wrong[0].replace('_', '-')}"
                raise ValueError(
                    f"{what} and {option_} exclude each other" if self.keep_duplicates and names[0] == "duplicates"
                    else f"{what} goes with {option_}"
                )  # fmt: skip
        if any(below >= above for above, below in zip(self.clusters, self.clusters[1:], strict=False)):
            raise ValueError(
                f"--clusters {' '.join(map(str, self.clusters))}: each level has fewer than the one before"
            )
        return self
