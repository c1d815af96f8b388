"""What may be asked of indexes of features: `dino2 search`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dinov2cli.requests.base import AtLeastOne, DeviceRequest, Request, argument, option
from dinov2cli.requests.eval import MAX_BAD_FRACTION, RESIZE_RATIO, FeaturesRequest

DATA = "Image files, folders of images and dataset strings."


class SearchBuildRequest(FeaturesRequest, command="search build", run_by="dinov2cli.search.collect:build"):
    """Make an index of the features of images, to search for alike ones.

    INDEX is a folder: the class token of each image in float16, memory-mapped, paths, and what they were made with.
    Interrupted, the same command goes on; unreadable images are counted and left out.

    Example:

        dino2 search build photos.index --model runs/demo --data ~/photos
    """

    index: Path = argument("The folder of the index.")
    model: str = option(..., "A run folder, a weights file, a URL or a released name.", metavar="CKPT")
    data: tuple[str, ...] = option(..., DATA, metavar="DATASET")
    dtype: Literal["float16", "float32"] = option("float16", "What features are stored in: 2 or 4 bytes a number.")
    config_file: Path | None = option(None, "Configuration instead of the run's own.", metavar="YAML")
    batch_size: AtLeastOne = option(256, "Images at a time.")
    resize_ratio: float = RESIZE_RATIO
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    as_json: bool = option(False, "Print one JSON object.", flags="--json", last=True)


class SearchAddRequest(DeviceRequest, command="search add", run_by="dinov2cli.search.collect:add", logs=True):
    """Add images to an index, prepared as those that are in it.

    Images that are there are passed over, and those whose file has changed since (size or time) replaced.

    Example:

        dino2 search add photos.index --data ~/album other-dog.jpg
    """

    index: Path = argument("The folder of the index.")
    data: tuple[str, ...] = option(..., DATA, metavar="DATASET")
    model: str | None = option(None, "Where the weights of the index are now, if not where they were.", metavar="CKPT")
    batch_size: AtLeastOne = option(256, "Images at a time.")
    num_workers: int | None = option(None, "Processes that decode images; by default from the cores.", ge=0, last=True)
    max_bad_fraction: float | None = MAX_BAD_FRACTION
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    as_json: bool = option(False, "Print one JSON object.", flags="--json", last=True)


class SearchRemoveRequest(Request, command="search remove", run_by="dinov2cli.search.collect:remove", logs=True):
    """Take images out of an index. Their files stay where they are.

    They are marked, and dropped from the files of the index once a quarter of it is.

    Example:

        dino2 search remove photos.index ~/album '*/class1/*'

        dino2 search remove photos.index --missing
    """

    index: Path = argument("The folder of the index.")
    which: tuple[str, ...] = argument(
        "Paths of images, folders, patterns with * ? or [...] for whole paths, or dataset strings they were added by.",
        default=(),
        metavar="WHICH",
        default_text=False,
    )
    missing: bool = option(False, "Those whose file is no longer there.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if not self.which and not self.missing:
            raise ValueError("WHICH is missing: name images, folders, patterns or datasets, or give --missing")
        return self


class SearchInfoRequest(Request, command="search info", run_by="dinov2cli.search.collect:info"):
    """Show what an index holds, and what it was made with.

    Example:

        dino2 search info photos.index
    """

    index: Path = argument("The folder of the index.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class SearchQueryRequest(DeviceRequest, command="search query", run_by="dinov2cli.search.query:run", logs=True):
    """Find the images of an index that are most alike to others, by the cosine of their features.

    QUERY is image files, a folder of images, a dataset string, or another index of the same weights. All images of the
    index are compared, unless --faiss asks for an approximation.

    Example:

        dino2 search query photos.index dog.jpg --top 20 --sheet dogs.html

        dino2 search query photos.index photos.index --not-itself --top 1 --json
    """

    index: Path = argument("The folder of the index.")
    query: tuple[str, ...] = argument("What to look for.", metavar="QUERY")
    top: AtLeastOne = option(10, "Images to find for each query.", flags="--top -k")
    not_itself: bool = option(False, "Leave out the query's own path, where it is in the index.")
    sheet: Path | None = option(
        None, "Draw the queries and what was found: a .png, or a .html that holds all its pictures.", metavar="FILE"
    )
    faiss: Literal["ivf", "hnsw"] | None = option(
        None,
        "Approximate by a faiss index, which is made at the first use and kept: ivf, inverted lists; hnsw, a graph.",
    )
    nprobe: AtLeastOne = option(128, "With --faiss ivf: lists to look into; more find more.")
    ef_search: AtLeastOne = option(256, "With --faiss hnsw: candidates to follow; more find more.")
    model: str | None = option(None, "Where the weights of the index are now, if not where they were.", metavar="CKPT")
    batch_size: AtLeastOne = option(256, "Images at a time.", last=True)
    num_workers: int | None = option(None, "Processes that decode images; by default from the cores.", ge=0, last=True)
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    as_json: bool = option(False, "Print one JSON object.", flags="--json", last=True)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        given = self.model_fields_set
        for name, kind in (("nprobe", "ivf"), ("ef_search", "hnsw")):
            if name in given and self.faiss != kind:
                raise ValueError(f"--{name.replace('_', '-')} goes with --faiss {kind}")
        return self
