"""YAML that people write: one entry is changed, and every other line, comments too, stays as it was."""

from typing import Any

import yaml


def with_entry(text: str, group: str, key: str, value: Any) -> str:
    """`text` with `value` under `key` of `group`, or (None) without the entry.

    Raises:
        ValueError: it is written so that this cannot be done line by line.
    """
    before = yaml.safe_load(text) or {}
    if not isinstance(old := before.get(group) or {}, dict):
        raise ValueError(f"{group} holds no keys")
    entries = {name: each for name, each in old.items() if name != key}
    wanted = {**before, group: entries if value is None else {**entries, key: value}}
    root: Any = yaml.compose(text, yaml.SafeLoader)
    pairs = {head.value: (head, node) for head, node in root.value} if root else {}
    lines = [line if line.endswith("\n") else f"{line}\n" for line in text.splitlines(keepends=True)]
    head, node = pairs.get(group, (root, root))
    if group not in pairs:
        lines += _dumped({group: wanted[group]}, 0)
    elif node.value == "" or not getattr(node, "flow_style", True):  # an entry a line, or none yet
        places = {name.value: (name.start_mark.line, _last_line(each) + 1) for name, each in node.value}
        end = _last_line(node) + 1
        start, end = places.get(key, (end, end))
        column = node.value[0][0].start_mark.column if node.value else 2
        lines[start:end] = [] if value is None else _dumped({key: value}, column)
    else:  # all on one line
        start, end = head.start_mark.line, _last_line(node) + 1
        if any("#" in line for line in lines[start:end]):
            raise ValueError(f"a comment stands among the entries of {group}")
        lines[start:end] = _dumped({group: wanted[group]}, 0)
    changed = "".join(lines)
    try:
        after = yaml.safe_load(changed) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if {**after, group: after.get(group) or {}} != wanted:
        raise ValueError("other entries would change, too")
    return changed


class _Dumper(yaml.SafeDumper):
    """Lists on one line."""


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def _dumped(content: dict[str, Any], column: int) -> list[str]:
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return [" " * column + line for line in text.splitlines(keepends=True)]


def _last_line(node: Any) -> int:
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        ends_before = node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line
        return int(node.end_mark.line) - int(ends_before)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)
