"""Is a name a path on this machine, or the id of a repository on the Hub?"""

import glob
import os
import re

REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """True if `name` has the form of a Hub id and no file, directory or pattern of files here is meant by it.

    `directory/missing` is a path if `directory` exists, so that a mistyped path is not looked for on the Hub.
    """
    if os.path.exists(name) or glob.has_magic(name) or os.path.isdir(os.path.dirname(name)):
        return False
    return REPOSITORY.fullmatch(name) is not None
