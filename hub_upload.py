"""Upload a model to the Hub in one commit, after checks and a list of what is sent.

    python hub_upload.py outputs/pretrain USER/NAME --dry_run
    python hub_upload.py outputs/pretrain USER/NAME --private
    python hub_upload.py outputs/lora USER/NAME --adapter --base_model USER/BASE
    python hub_upload.py outputs/pretrain USER/NAME --space

This needs a token with write access: run `hf auth login` or set HF_TOKEN. If the connection breaks, run the same command again:
it sends only what is missing.
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
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from training.cli import run_main
from training.engine.run_folder import ADAPTER, CARD, MISTAKES, RESPONSES, RESPONSES_PAGE
from training.errors import UserError, one_line, printable
from training.sharing import checks
from training.sharing.leaks import Files, check_leaks

SPACE = Path(__file__).parent / "space"
TIMEOUT_SECONDS = 120  # without any answer from the Hub
ATOMIC = "an upload changes all files or none"
COMMIT_SUFFIX = "(hub_upload.py)"  # marks the commits made here: others are not overwritten
SPACE_CARD = """---
title: "{name}"
license: apache-2.0
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
models:
- {repository}
---

A page for trying [{repository}](https://huggingface.co/{repository}).
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="directory of a finished model, with any head")
    parser.add_argument("repository", metavar="USER/NAME", help="repository to upload to; created if missing")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", default="main", help="branch to upload to; created if missing (default: main)")
    parser.add_argument("--adapter", action="store_true", help="upload only the LoRA adapter")
    parser.add_argument("--base_model", default="", metavar="USER/BASE", help="Hub id of the base model")
    parser.add_argument("--license", default="", help="license to put into the model card, such as apache-2.0")
    parser.add_argument("--space", action="store_true", help="also create a Space of the same name, to try the model in")
    parser.add_argument("--overwrite", action="store_true", help="upload even if others have changed the repository")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code in DIRECTORY that is not from this package")
    parser.add_argument("--dry_run", action="store_true", help="check and list the files, without uploading them")
    arguments = parser.parse_args()
    arguments.directory = Path(os.path.expanduser(arguments.directory))
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Validate arguments before any file is read."""
    checks.check_repo_id(arguments.repository, "USER/NAME")
    if arguments.base_model:
        checks.check_repo_id(arguments.base_model, "--base_model")
    if arguments.adapter and arguments.space:
        raise UserError("--space needs a whole model: drop --space or --adapter.")
    if arguments.adapter and not arguments.base_model:
        raise UserError("--adapter needs the base model on the Hub: pass --base_model USER/BASE.")
    branch = arguments.revision
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", branch, re.ASCII) and ".." not in branch
    if not is_name or re.match("refs/|[0-9a-f]{40}$", branch):
        raise UserError(f"--revision {branch!r:.80} is not a branch name: use letters, digits, `-` and `_`, as in v2.")
    if not arguments.directory.is_dir():
        raise UserError(f"{arguments.directory} is not a directory: pass the directory of a finished model.")


def collect_files(arguments: argparse.Namespace) -> Files:
    """Collect and check the files to upload.

    Raises:
        UserError: a check failed.
    """
    directory, config = arguments.directory, checks.ADAPTER_CONFIG if arguments.adapter else checks.CONFIG
    if arguments.adapter and (directory / ADAPTER).is_dir():
        directory = directory / ADAPTER
    files: dict[str, Path | bytes] = {**checks.model_files(directory, arguments.trust_remote_code, config)}
    if arguments.adapter:
        files[config] = checks.prepare_adapter_config(directory, arguments.base_model)
    files[CARD] = checks.prepare_card(directory, arguments.repository, arguments.base_model, arguments.license)
    check_leaks(files)
    checks.check_weights(directory, files)
    if not arguments.adapter:
        checks.check_loads(directory, files)
    return files


def print_files(files: Files, arguments: argparse.Namespace) -> None:
    """Print the files to upload with their sizes in bytes, and the files that are left out."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in sorted(files.items())}
    for name, size in sizes.items():
        print(f"{size:>15,}  {printable(name)}")
    print(f"{sum(sizes.values()):>15,}  bytes in total, for {arguments.repository} ({arguments.revision})")
    if quoting := sorted(files.keys() & {MISTAKES, RESPONSES, RESPONSES_PAGE}):
        print(f"Note: {', '.join(quoting)} and {CARD} contain texts of the test data.")
    skipped = sorted(path.name for path in arguments.directory.iterdir() if path.name not in files)
    print(f"Not uploaded: {', '.join(map(printable, skipped)) or 'nothing'}")
    if arguments.space:
        print(f"Space of the same name: {', '.join([CARD, *space_files()])}")


def space_files() -> dict[str, Path]:
    return {path.name: path for path in sorted(SPACE.iterdir()) if path.is_file()}


def prepare_branch(api: HfApi, repository: str, kind: str, revision: str, arguments: argparse.Namespace) -> str:
    """Create the repository and the branch if missing, and return the id of the branch's last commit.

    Raises:
        UserError: no write access, changed by others since the last upload, or public although --private was passed.
    """
    with hub_errors(repository):
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repository, private=arguments.private or None, repo_type=kind, exist_ok=True, space_sdk=sdk)
        if arguments.private and not api.repo_info(repository, repo_type=kind).private:
            raise UserError(f"{repository} exists and is public: make it private in its settings, or drop --private.")
        is_new = revision not in {branch.name for branch in api.list_repo_refs(repository, repo_type=kind).branches}
        if is_new:
            api.create_branch(repository, branch=revision, repo_type=kind)
        head = api.list_repo_commits(repository, repo_type=kind, revision=revision)[0]
        existing = set(api.list_repo_files(repository, repo_type=kind, revision=head.commit_id))
        is_ours = is_new or head.title.endswith(COMMIT_SUFFIX) or existing <= {".gitattributes"}
        if not (is_ours or arguments.overwrite):
            raise UserError(
                f"{repository} ({revision}) was changed by others, last in {head.title!r:.80}: review the changes, then pass "
                "--overwrite or another --revision."
            )
        return head.commit_id


def upload(api: HfApi, repository: str, kind: str, revision: str, files: Files, title: str, parent: str) -> CommitInfo:
    """Upload all files in one commit on top of `parent`.

    Raises:
        UserError: the branch has moved on, or the connection broke.
    """
    with hub_errors(repository):
        existing = set(api.list_repo_files(repository, repo_type=kind, revision=parent))
        # Weights that were sharded differently would be loaded together with the new ones.
        stale = [name for name in existing - files.keys() if any(fnmatch(name, pattern) for pattern in checks.WEIGHTS)]
        return api.create_commit(
            repository,
            [*(CommitOperationAdd(*item) for item in files.items()), *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"{title} {COMMIT_SUFFIX}",
            repo_type=kind,
            revision=revision,
            parent_commit=parent,
        )


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into a UserError of one line."""
    try:
        yield
    except HfHubHTTPError as error:
        message = one_line(ValueError(error.server_message or str(error)))
        advice = {
            401: "log in again with `hf auth login`",
            403: "use a token with write access to it",
            412: "it changed during the upload; run the same command again",
        }.get(error.response.status_code, ATOMIC)
        raise UserError(f"the Hub rejected {repository} ({message}): {advice}.") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the upload of a large file failed
        cause: Any = error.__cause__ or error
        remedy = f"{ATOMIC}; run the same command again to send what is missing"
        raise UserError(f"the connection to the Hub broke ({one_line(cause)}): {remedy}.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if type(error) is ValueError:  # the Hub rejects the metadata of a card
            raise UserError(f"the Hub rejected {repository} ({one_line(error)}): {ATOMIC}.") from error
        raise UserError(
            f"the server does not answer like the Hub ({type(error).__name__}): check HF_ENDPOINT and HF_TOKEN."
        ) from error


def main() -> None:
    arguments = parse_arguments()
    name, revision, base_model = arguments.repository, arguments.revision, arguments.base_model
    files = collect_files(arguments)
    print_files(files, arguments)
    if arguments.dry_run:
        return
    if not get_token():
        raise UserError("no token: log in with `hf auth login`, or set HF_TOKEN.")
    get_session().timeout = TIMEOUT_SECONDS
    api = HfApi()
    with hub_errors(base_model):
        if base_model and not api.repo_exists(base_model):
            raise UserError(f"--base_model {base_model} is not on the Hub, or not visible to you: upload it first.")
    title = arguments.directory.resolve().name
    head = prepare_branch(api, name, "model", revision, arguments)
    space_head = prepare_branch(api, name, "space", "main", arguments) if arguments.space else ""
    commit = upload(api, name, "model", revision, files, title, head)
    print(f"Uploaded to {api.endpoint}/{name}. To load exactly this version:")
    if arguments.adapter:
        print(f"    peft.PeftModel.from_pretrained(model, {name!r}, revision={commit.oid!r})  # model: {base_model}")
    else:
        print(f"    from_pretrained({name!r}, revision={commit.oid!r}, trust_remote_code=True)")
    if arguments.space:
        card = SPACE_CARD.format(name=name.partition("/")[2], repository=name).encode()
        upload(api, name, "space", "main", {**space_files(), CARD: card}, title, space_head)
        with hub_errors(name):
            api.add_space_variable(name, "MODEL", name)
            api.add_space_variable(name, "REVISION", commit.oid)
            is_private = api.repo_info(name).private
        print(f"The page is at {api.endpoint}/spaces/{name}.")
        if is_private:
            print("The model is private: in the settings of the Space, add a token with read access as the secret HF_TOKEN.")


if __name__ == "__main__":
    run_main(main)
