"""Share a model on the Hub: checked first, shown, and then sent in one commit.

    python hub_upload.py outputs/pretrain USER/NAME --dry_run
    python hub_upload.py outputs/pretrain USER/NAME --private
    python hub_upload.py outputs/lora USER/NAME --adapter --base_model USER/BASE
    python hub_upload.py outputs/pretrain USER/NAME --space

It needs a token that may write: `hf auth login`, or HF_TOKEN in the environment. When a connection breaks, the same command
sends what is missing.
"""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from training.cli import run_main
from training.engine.pretrained import ADAPTER
from training.errors import UserError, one_line, printable
from training.results.cards import CARD
from training.results.classification_report import MISTAKES
from training.results.responses import PAGE, RESPONSES
from training.sharing.checks import (
    ADAPTER_CONFIG,
    WEIGHTS,
    adapter_files,
    check_loads,
    check_weights,
    model_files,
    prepared_adapter_config,
    prepared_card,
)
from training.sharing.leaks import Files, check_leaks

SPACE = Path(__file__).parent / "space"
SILENCE_SECONDS = 120  # of the Hub, before we give up
ALL_OR_NOTHING = "the files there change all at once or not at all"
MARK = "(hub_upload.py)"  # ends what our commits say
SPACE_CARD = """---
title: "{name}"
license: apache-2.0
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
models:
- {repository}
---

A page on which to try [{repository}](https://huggingface.co/{repository}).
"""


def parse() -> argparse.Namespace:
    """What is asked for.

    Raises:
        UserError: it makes no sense.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a finished model, with any head")
    parser.add_argument("repository", metavar="USER/NAME", help="where it goes; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="if it is made: for nobody else to see")
    parser.add_argument("--revision", default="main", help="the branch; it is made if it is not there (default: main)")
    parser.add_argument("--adapter", action="store_true", help="send the LoRA adapter alone")
    parser.add_argument("--base_model", default="", metavar="USER/BASE", help="where the model lies that this one comes from")
    parser.add_argument("--license", default="", help="that others may use it under, as apache-2.0, if the card names none yet")
    parser.add_argument("--space", action="store_true", help="make a Space of the same name, too: a page to try the model")
    parser.add_argument("--overwrite", action="store_true", help="also what others have changed there meanwhile")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the folder that is not this package's")
    parser.add_argument("--dry_run", action="store_true", help="check and show, and send nothing")
    arguments = parser.parse_args()
    for option, name in (("USER/NAME", arguments.repository), ("--base_model", arguments.base_model)):
        try:
            validate_repo_id(name or "user/name")
        except HFValidationError as error:
            raise UserError(f"{option} {name!r} cannot be a name on the Hub: {one_line(error)}") from error
        if name and "/" not in name:
            raise UserError(f"{option} {name!r} lacks a user: give it as USER/NAME.")
    if arguments.adapter and arguments.space:
        raise UserError("--space shows a whole model: send the adapter by itself.")
    if arguments.adapter and not arguments.base_model:
        raise UserError("--adapter is of use with its base alone: say where that lies, by --base_model USER/BASE.")
    branch = arguments.revision
    if (
        not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", branch, re.ASCII)
        or ".." in branch
        or re.match("refs/|[0-9a-f]{40}$", branch)
    ):
        raise UserError(f"--revision {branch!r:.80} cannot be a branch: give letters, digits, `-` and `_`, as in v2.")
    arguments.folder = Path(os.path.expanduser(arguments.folder))
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is no folder: give the one of a finished model.")
    return arguments


def checked_files(arguments: argparse.Namespace) -> Files:
    """What is sent, when nothing about it is to be refused."""
    folder = arguments.folder
    files: dict[str, Path | bytes]
    if arguments.adapter:
        folder = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
        files = {
            **adapter_files(folder, arguments.trust_remote_code),
            ADAPTER_CONFIG: prepared_adapter_config(folder, arguments.base_model),
        }
    else:
        files = {**model_files(folder, arguments.trust_remote_code)}
    files[CARD] = prepared_card(folder, arguments.repository, arguments.base_model, arguments.license)
    check_leaks(files)
    check_weights(folder, files)
    if not arguments.adapter:
        check_loads(folder, files)
    return files


def show(files: Files, arguments: argparse.Namespace) -> None:
    """What is sent, how large it is, and what stays here."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in sorted(files.items())}
    for name, size in sizes.items():
        print(f"{size:>15,}  {printable(name)}")
    print(f"{sum(sizes.values()):>15,}  bytes in all, for {arguments.repository} ({arguments.revision})")
    if told := sorted(files.keys() & {MISTAKES, RESPONSES, PAGE}):
        print(f"Of these {', '.join(told)} and {CARD} hold texts of the data that it was tested on.")
    stays = sorted(path.name for path in arguments.folder.iterdir() if path.name not in files)
    print(f"Stays here: {', '.join(map(printable, stays)) or 'nothing'}")
    if arguments.space:
        print(f"And a Space of the same name: {', '.join([CARD, *page_files()])}")


def page_files() -> dict[str, Path]:
    return {path.name: path for path in sorted(SPACE.iterdir()) if path.is_file()}


def place(api: HfApi, repository: str, kind: str, revision: str, arguments: argparse.Namespace) -> str:
    """The commit that the next one follows, in a repository and a branch that are made if they are not there.

    Raises:
        UserError: it may not be written, others have changed it since, or all can read what is to be private.
    """
    with hub_errors(repository):
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repository, private=arguments.private or None, repo_type=kind, exist_ok=True, space_sdk=sdk)
        if arguments.private and not api.repo_info(repository, repo_type=kind).private:
            raise UserError(
                f"{repository} is there already, and public: make it private in its settings, or leave --private out."
            )
        is_new = revision not in {branch.name for branch in api.list_repo_refs(repository, repo_type=kind).branches}
        if is_new:
            api.create_branch(repository, branch=revision, repo_type=kind)
        head = api.list_repo_commits(repository, repo_type=kind, revision=revision)[0]
        there = api.list_repo_files(repository, repo_type=kind, revision=head.commit_id)
        if not (is_new or arguments.overwrite or head.title.endswith(MARK) or set(there) <= {".gitattributes"}):
            raise UserError(
                f"{repository} ({revision}) is ahead: others have changed it, the last time by {head.title!r:.80}. Look at it, "
                "and pass --overwrite, or another --revision."
            )
        return head.commit_id


def send(api: HfApi, repository: str, kind: str, revision: str, files: Files, title: str, parent: str) -> CommitInfo:
    """One commit with all files.

    Raises:
        UserError: others were there in this moment, or the connection broke.
    """
    with hub_errors(repository):
        there = set(api.list_repo_files(repository, repo_type=kind, revision=parent))
        # Weights in other parts would be loaded beside the new ones.
        old = [name for name in there - files.keys() if any(fnmatch(name, pattern) for pattern in WEIGHTS)]
        return api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, file) for name, file in files.items()),
                *(CommitOperationDelete(name) for name in old),
            ],
            commit_message=f"{title} {MARK}",
            repo_type=kind,
            revision=revision,
            parent_commit=parent,
        )


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """What the Hub refuses, and what does not reach it, as one line."""
    try:
        yield
    except HfHubHTTPError as error:
        said = one_line(ValueError(error.server_message or str(error)))
        advice = {
            401: "log in again by `hf auth login`",
            403: "take a token that may write there",
            412: "it has changed in this very moment; run the same command again",
        }.get(error.response.status_code, ALL_OR_NOTHING)
        raise UserError(f"the Hub refuses {repository} ({said}): {advice}.") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last: a large file that did not get through
        cause: Any = error.__cause__ or error
        raise UserError(
            f"the connection to the Hub broke ({one_line(cause)}): {ALL_OR_NOTHING}, and the same command sends what is "
            "missing."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if type(error) is ValueError:  # what the Hub says of a card
            raise UserError(f"the Hub refuses {repository} ({one_line(error)}): {ALL_OR_NOTHING}.") from error
        raise UserError(
            f"what answers as the Hub does not speak as one ({type(error).__name__}): look at HF_ENDPOINT, and at HF_TOKEN."
        ) from error


def main() -> None:
    arguments = parse()
    name, revision = arguments.repository, arguments.revision
    files = checked_files(arguments)
    show(files, arguments)
    if arguments.dry_run:
        return
    if not get_token():
        raise UserError("there is no token to write with: log in by `hf auth login`, or set HF_TOKEN.")
    get_session().timeout = SILENCE_SECONDS
    api = HfApi()
    if base := arguments.base_model:
        with hub_errors(base):
            if not api.repo_exists(base):
                raise UserError(f"--base_model {base} is not on the Hub, or not for you to see: upload it first.")
    title = arguments.folder.resolve().name
    head = place(api, name, "model", revision, arguments)
    space_head = place(api, name, "space", "main", arguments) if arguments.space else ""
    commit = send(api, name, "model", revision, files, title, head)
    print(f"It is at {api.endpoint}/{name}. To load this version, whatever comes after it:")
    if arguments.adapter:
        print(f"    peft.PeftModel.from_pretrained(model, {name!r}, revision={commit.oid!r})  # model: {base}")
    else:
        print(f"    from_pretrained({name!r}, revision={commit.oid!r}, trust_remote_code=True)")
    if arguments.space:
        card = SPACE_CARD.format(name=name.partition("/")[2], repository=name).encode()
        send(api, name, "space", "main", {**page_files(), CARD: card}, title, space_head)
        with hub_errors(name):
            api.add_space_variable(name, "MODEL", name)
            api.add_space_variable(name, "REVISION", commit.oid)
            is_private = api.repo_info(name).private
        print(f"Its page is at {api.endpoint}/spaces/{name}.")
        if is_private:
            print("The model is private: in the page's settings, add a token that may read it, as the secret HF_TOKEN.")


if __name__ == "__main__":
    run_main(main)
