"""Keys of distillation: a frozen teacher, and one student or several."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from dinov2cli.config.group import Group, key
from dinov2cli.config.images import FromList
from dinov2cli.config.library import GivenArguments
from dinov2cli.requests.images import Words

Students = Annotated[tuple[GivenArguments, ...], FromList, Words("a list, each {name: NAME, GROUP: {KEY: VALUE}}", str)]


class Distillation(Group):
    """A frozen teacher, trained before and usually larger, in the place of the student's own average."""

    teacher: str = key(
        "", "(dino2) The teacher's weights: a run, a file, a URL or a released name; empty: no distillation."
    )
    digest: str = key(
        "", "(dino2) Fingerprint of their files, which dino2 fills in: a run goes on with the same teacher only."
    )
    patches: Literal["masked", "all"] = key(
        "masked",
        "(dino2) Patches whose outputs are compared: those that the masks choose, or all; the student sees every patch "
        "in either case.",
    )
    students: Students = key(
        (),
        "(dino2) Several students that learn from one pass of the teacher: of each its name, that of its run folder in "
        "train.output_dir, and the keys in which it differs from what is said for all.",
    )

    def contradictions(self) -> Iterator[str]:
        """What does not go together, a line each."""
        nobody = "there is no teacher to learn from; set distillation.teacher (--teacher)"
        if not self.teacher and self.patches != "masked":
            yield f"distillation.patches={self.patches}: {nobody}"
        if not self.teacher and self.students:
            yield f"distillation.students: {nobody}"
        names = [student.get("name") for student in self.students]
        for student, name in zip(self.students, names, strict=True):
            about = f"distillation.students: {name}"
            if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)):
                yield f"distillation.students={student}: needs a name that a folder can have, such as name: small"
            elif names.count(name) > 1:
                yield f"{about}: is the name of {names.count(name)} students, and each has a folder of its own"
            for group, keys in student.items():
                if group != "name" and not isinstance(keys, dict):
                    yield f"{about}: {group}: must be a group of keys, such as student: {{arch: vit_small}}"
