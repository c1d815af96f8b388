"""Stages of long work: folders whose content is kept as long as all that it depends on is the same.

`stage.json` tells what that is, and whether the stage is done; what is there of one that is not, it goes on from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.files import digest, parse_json, write_text, writing


class Stage:
    """A stage of several processes' work. Made by all of them.

    Args:
        folder: emptied unless it holds what depends on the same.
        depends: all that the content depends on, as JSON; the keys of other stages among it.

    Attributes:
        key: names the content.
        said: what `finish` was told, once the stage is done.
    """

    def __init__(self, folder: Path, **depends: Any) -> None:
        self.folder, self._depends = folder, json.loads(json.dumps(depends, default=str))
        self.key = digest(json.dumps(self._depends, sort_keys=True))[:24]
        self.said: dict[str, Any] | None = None
        if distributed.is_main():
            there = self._read()
            changed = sorted(name for name in {*there.get("depends", {}), *self._depends}
                             if there.get("depends", {}).get(name) != self._depends.get(name))  # fmt: skip
            if changed:
                if there:
                    logger.info("%s: made anew, as another %s is asked for", folder, ", ".join(changed))
                with writing(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir(parents=True)
                    self._write()
            else:
                self.said = there.get("said")
        self.said = distributed.broadcast_object(self.said)

    @property
    def done(self) -> bool:
        return self.said is not None

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def finish(self, **said: Any) -> None:
        """All processes have done their part; `said` is remembered."""
        distributed.barrier()
        self.said = json.loads(json.dumps(said))
        if distributed.is_main():
            self._write()
        distributed.barrier()

    def _read(self) -> dict[str, Any]:
        try:
            found = parse_json((self.folder / "stage.json").read_bytes())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def _write(self) -> None:
        content = {"depends": self._depends, "said": self.said}
        with writing(self.folder):
            write_text(self.folder / "stage.json", json.dumps(content, indent=1), flush=True)


def share(items: int) -> range:
    """Of so many pieces of work those of this process: every `world_size`-th, as their cost grows or falls alike."""
    return range(distributed.rank(), items, distributed.world_size())
