"""Compares two records: `python tests/identity/compare.py BEFORE AFTER` lists what is not the same to the last bit.

Exit code 1 if anything differs. Parts that only one of the two has are left out, and named.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """|a - b| <= absolute + relative * max(|a|, |b|); neither: not compared."""

    relative: float | None = None
    absolute: float = 0.0

    def holds(self, before: float, after: float) -> bool:
        limit = self.absolute + (self.relative or 0) * max(abs(before), abs(after))
        return abs(before - after) <= limit or (before != before and after != after)


def differences(before: Any, after: Any, bounds: dict[str, Bound] | None = None, path: str = "") -> list[str]:
    """One line for each number or text that differs: `path: before -> after`.

    Args:
        bounds: pattern of a path (a regular expression that matches from its start) -> what is allowed there; the
            first that matches counts. Without a match floats, like all else, must be equal.
    """
    bound = next((bound for pattern, bound in (bounds or {}).items() if re.match(pattern, path)), None)
    if bound is not None and bound == Bound():
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{path}/{key}: gone" for key in before if key not in after]
        found += [f"{path}/{key}: new" for key in after if key not in before]
        if not found and list(before) != list(after):
            found.append(f"{path}: other order: {', '.join(before)} -> {', '.join(after)}")
        both = [key for key in before if key in after]
        return found + [line for key in both for line in differences(before[key], after[key], bounds, f"{path}/{key}")]
    if isinstance(before, list) and isinstance(after, list):
        found = [f"{path}: {len(before)} entries -> {len(after)}"] if len(before) != len(after) else []
        pairs = enumerate(zip(before, after, strict=False))
        return found + [line for i, (a, b) in pairs for line in differences(a, b, bounds, f"{path}/{i}")]
    if bound is not None and _is_number(before) and _is_number(after):
        return [] if bound.holds(before, after) else [f"{path}: {before!r} -> {after!r}, beyond {bound}"]
    same = before == after or (before != before and after != after)
    return [] if same and type(before) is type(after) else [f"{path}: {before!r} -> {after!r}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main(before: Path, after: Path) -> int:
    parts = [{path.stem for path in folder.glob("*.json")} for folder in (before, after)]
    for part in sorted(parts[0] ^ parts[1]):
        print(f"{part}: in one of the two only")
    count = 0
    for part in sorted(parts[0] & parts[1]):
        a, b = (json.loads((folder / f"{part}.json").read_text()) for folder in (before, after))
        lines = differences(a, b, path=part)
        count += len(lines)
        print(f"{part}: {len(lines)} differences" if lines else f"{part}: the same")
        for line in lines[:30]:
            print(f"  {line}")
    return 1 if count or not parts[0] & parts[1] else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
