"""A config with other values."""


def changed(config, **changes):
    """A copy; keys are written with __ for the dot: log__every=1."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return copy
