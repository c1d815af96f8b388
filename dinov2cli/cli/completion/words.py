"""What the shell may offer for an argument: preset names, configuration keys and their words. Imports no torch.

The configuration is imported where it is asked for: it is a third of what `dino2 --help` would take.
"""


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Preset names that start with `incomplete`, each with its summary."""
    from dinov2cli.config import list_presets

    return [(preset.name, preset.summary) for preset in list_presets() if preset.name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[tuple[str, str]]:
    """`group.key=` overrides that start with `incomplete`; after the `=`, the words that the key takes."""
    from dinov2cli.config.tree import FIELDS

    key, equals, _ = incomplete.partition("=")
    if not equals:
        found = [(f"{name}=", field.description or "") for name, field in FIELDS.items()]
    else:
        found = [(f"{key}={word}", "") for word in override_words().get(key, ())]
    return [(text, description) for text, description in found if text.startswith(incomplete)]


def override_words() -> dict[str, tuple[str, ...]]:
    """Keys that take one of a few words, with these words."""
    from dinov2cli.config.tree import FIELDS, choices

    words = {key: choices(field) for key, field in FIELDS.items()}
    words |= {key: ("true", "false") for key, field in FIELDS.items() if field.annotation is bool}
    return {key: known for key, known in words.items() if known}
