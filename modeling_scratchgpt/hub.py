"""Distinguish ids of repositories on the Hub from local paths."""

import glob
import os
import re


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form of a Hub id, and is neither a local path nor a glob pattern."""
    # `directory/missing` is a mistyped path if `directory` exists, and not looked up on the Hub.
    if os.path.exists(name) or glob.has_magic(name) or os.path.isdir(os.path.dirname(name)):
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII) is not None
