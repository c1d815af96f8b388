"""Evaluations in other processes: of this machine, or of a Slurm job."""

from pathlib import Path

from dinov2cli.launch.local import Elsewhere, launch_here
from dinov2cli.launch.slurm import script, submit, wanted_for
from dinov2cli.requests.eval import EvalRequest


def launch(request: EvalRequest) -> Elsewhere | None:
    """Start an evaluation where the request says: as a job, in several processes here, or (None) in this process.

    A job's folder is `slurm/` in the output folder, else in the run that the checkpoint belongs to, else here.

    Raises:
        Dino2Error: as the launchers.
    """
    if request.slurm.is_asked:
        checkpoint = Path(request.checkpoint).absolute()
        runs = (place for place in (checkpoint, *checkpoint.parents) if (place / "config.yaml").exists())
        folder = request.output_dir or next(runs, Path())
        wanted = wanted_for(request.slurm, request.gpus, cpu=request.device == "cpu", usual=1)
        request, name = request.model_copy(update={"device": "cpu"} if wanted.cpu else {}), request.protocol()
        if request.dry_run:
            return Elsewhere(script(wanted, folder=folder.absolute() / "slurm", name=f"dino2-{name}"))
        return Elsewhere(submit(request, wanted, folder=folder.absolute() / "slurm", name=f"dino2-{name}"))
    return launch_here(request)
