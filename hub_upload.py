"""Upload a model to the Hub in one commit, after checks and a list of what is sent.

    python hub_upload.py outputs/pretrain USER/NAME --dry_run
    python hub_upload.py outputs/pretrain USER/NAME --private
    python hub_upload.py outputs/lora USER/NAME --adapter --base_model USER/BASE
    python hub_upload.py outputs/pretrain USER/NAME --space

This needs a token with write access: run `hf auth login` or set HF_TOKEN. If the connection breaks, run the same command again:
it sends only what is missing. Files of an earlier upload that are not sent again are deleted. A card that was edited on the Hub
keeps its text and its metadata, apart from the metrics.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from space.app import HEADERS, TYPES, WEB, WEB_EXPORT, export
from space.check import check_page
from training.cli import run_main
from training.engine.run_folder import ADAPTER, CARD, MISTAKES, RESPONSES, RESPONSES_PAGE
from training.errors import UserError, explain_errors, one_line, printable
from training.sharing import checks
from training.sharing.leaks import Files, check_leaks

TIMEOUT_SECONDS = 120  # without any answer from the Hub
ATOMIC = "an upload changes all files or none"
COMMIT_SUFFIX = "(hub_upload.py)"  # marks the commits made here: others are not overwritten
GENERATED = "Blob of the generated card: "  # in the description of a commit: another card on the Hub was edited there


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="directory of a finished model, with any head")
    parser.add_argument("repository", metavar="USER/NAME", help="repository to upload to; created if missing")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", default="main", help="branch to upload to; created if missing (default: main)")
    parser.add_argument("--adapter", action="store_true", help="upload only the LoRA adapter")
    parser.add_argument("--base_model", default="", metavar="USER/BASE", help="Hub id of the base model")
    parser.add_argument("--license", default="", help="license to put into the model card, such as apache-2.0")
    parser.add_argument("--space", action="store_true", help="also a page that runs the model in the browser: a static Space")
    parser.add_argument("--overwrite", action="store_true", help="replace what was changed on the Hub, also an edited card")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code in DIRECTORY that is not from this package")
    parser.add_argument("--dry_run", action="store_true", help="check and list the files, without uploading them")
    arguments = parser.parse_args()
    arguments.directory = Path(os.path.expanduser(arguments.directory))
    if arguments.adapter and (arguments.directory / ADAPTER).is_dir():
        arguments.directory /= ADAPTER
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Validate arguments before any file is read."""
    checks.check_repo_id(arguments.repository, "USER/NAME")
    if arguments.base_model:
        checks.check_repo_id(arguments.base_model, "--base_model")
    if arguments.adapter and arguments.space:
        raise UserError("--space needs a whole model: drop --space or --adapter.")
    if arguments.private and arguments.space:
        raise UserError("--space needs a public model, which its page can read: drop --space or --private.")
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
    files: dict[str, Path | bytes] = {**checks.model_files(directory, arguments.trust_remote_code, config)}
    if arguments.adapter:
        files[config] = checks.prepare_adapter_config(directory, arguments.base_model)
    files[CARD] = checks.prepare_card(directory, arguments.repository, arguments.base_model, arguments.license)
    check_leaks(files)
    checks.check_weights(directory, files)
    if not arguments.adapter:
        checks.check_loads(directory, files)
    return add_export(files, arguments) if arguments.space else files


def add_export(files: Files, arguments: argparse.Namespace) -> Files:
    """Add the ONNX export, which the page runs, and to the card how to use it.

    Raises:
        UserError: the page does not run the model.
    """
    with explain_errors(f"--space: {arguments.directory} cannot run in a browser", ValueError):
        directory, _ = export(arguments.directory)
    print(check_page(directory))
    paths = sorted([directory / CARD, *directory.glob("*.json"), *directory.glob("onnx/*")])  # a user's directory may have more
    added: Files = {f"{WEB_EXPORT}/{path.relative_to(directory).as_posix()}": path for path in paths}
    check_leaks(added)
    usage = (directory / CARD).read_text(encoding="utf-8")
    return {**files, **added, CARD: checks.add_page(files[CARD], usage, arguments.repository, WEB_EXPORT)}


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
        print(f"Space of the same name: {', '.join(space_files(arguments.repository, ''))}")


def space_files(repository: str, revision: str) -> Files:
    """The page, for this version of the model: visitors get old page and model, or new page and model."""
    settings = json.dumps({"model": repository, "revision": revision, "path": WEB_EXPORT}).encode()
    title, link = repository.partition("/")[2], f"[{repository}](https://huggingface.co/{repository})"
    metadata = SpaceCardData(title=title, sdk="static", license="apache-2.0", models=[repository], custom_headers=HEADERS)
    card = f"---\n{metadata.to_yaml()}\n---\n\nA page that runs {link} in its visitor's browser.\n"
    page = {path.name: path for path in sorted(WEB.iterdir()) if path.suffix in TYPES}  # no files of editors
    return {CARD: card.encode(), "model.json": settings, **page}


@dataclass(frozen=True)
class Branch:
    """A branch before an upload."""

    name: str
    head: str  # id of its last commit
    files: set[str]
    edited_card: bytes  # its card, if it is not as the last upload generated it; else empty


def prepare_branch(api: HfApi, repository: str, kind: str, revision: str, arguments: argparse.Namespace) -> Branch:
    """Create the repository and the branch if missing, and compare the branch with the last upload.

    Raises:
        UserError: no write access, other changes than those of the card, public with --private, or private with --space.
    """
    options: dict[str, Any] = {"repo_type": kind}
    with hub_errors(repository):
        sdk = "static" if kind == "space" else None
        api.create_repo(repository, private=arguments.private or None, exist_ok=True, space_sdk=sdk, **options)
        info = api.repo_info(repository, **options)
        if arguments.private and not info.private:
            raise UserError(f"{repository} exists and is public: make it private in its settings, or drop --private.")
        if arguments.space and (info.private or info.gated):
            access = "private" if info.private else "gated"
            raise UserError(f"the {kind} {repository} is {access}: make it public in its settings, or drop --space.")
        is_new = revision not in {branch.name for branch in api.list_repo_refs(repository, **options).branches}
        if is_new:
            api.create_branch(repository, branch=revision, **options)
        commits = api.list_repo_commits(repository, revision=revision, **options)
        # The Hub fills a new static Space with an example; a history that was squashed to one commit has another title.
        is_example = kind == "space" and [commit.title for commit in commits] == ["initial commit"]
        last = next((commit for commit in commits if commit.title.endswith(COMMIT_SUFFIX)), None)
        files = list_files(api, repository, kind, commits[0].commit_id)
        uploaded = list_files(api, repository, kind, last.commit_id) if last else {}
        changed = {name for name, _ in files.items() ^ uploaded.items()} - {".gitattributes"}
        if changed - {CARD} and not (is_new or is_example or arguments.overwrite):
            remedy = "pass --overwrite, which replaces those of the model, too" if kind == "space" else "pass --overwrite"
            other = "upload without --space" if kind == "space" else "pass another --revision"
            raise UserError(
                f"the {kind} {repository} ({revision}) has changes not made by this program ("
                f"{printable(', '.join(sorted(changed))):.200}), the last in {commits[0].title!r:.80}: review them, then "
                f"{remedy}, or {other}."
            )
        is_edited = CARD in files and not (last and GENERATED + files[CARD] in last.message)
        card = b""
        if is_edited and not (is_example or arguments.overwrite):
            card = Path(api.hf_hub_download(repository, CARD, revision=commits[0].commit_id, **options)).read_bytes()
        return Branch(revision, commits[0].commit_id, {*files}, card)


def list_files(api: HfApi, repository: str, kind: str, revision: str) -> dict[str, str]:
    """The ids of the contents of all files."""
    items = api.list_repo_tree(repository, recursive=True, revision=revision, repo_type=kind)
    return {item.path: item.blob_id for item in items if isinstance(item, RepoFile)}


def upload(api: HfApi, repository: str, kind: str, branch: Branch, files: Files, arguments: argparse.Namespace) -> CommitInfo:
    """Upload all files, and delete those of an earlier upload, in one commit on top of the branch.

    Raises:
        UserError: the branch has moved on, or the connection broke.
    """
    generated: Any = files[CARD]
    if branch.edited_card:
        files = {**files, CARD: checks.merge_card(generated, branch.edited_card, arguments.license)}
        print(f"{repository}: the text of the card, which was edited on the Hub, is kept (--overwrite would replace it).")
    # An adapter, a chat template, metrics or weights of another upload would be taken for those of this one.
    known = (*checks.UPLOADED, f"{WEB_EXPORT}/*") if kind == "model" else ("*.py", "requirements.txt", "*.css", "*.js")
    stale = [name for name in sorted(branch.files - files.keys()) if any(fnmatch(name, pattern) for pattern in known)]
    if stale:
        print(f"{repository}: deleting files of an earlier upload: {', '.join(stale)}")
    with hub_errors(repository):
        return api.create_commit(
            repository,
            [*(CommitOperationAdd(*item) for item in files.items()), *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"{arguments.directory.resolve().name} {COMMIT_SUFFIX}",
            commit_description=GENERATED + git_hash(generated),
            repo_type=kind,
            revision=branch.name,
            parent_commit=branch.head,
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
    branch = prepare_branch(api, name, "model", revision, arguments)
    space = prepare_branch(api, name, "space", "main", arguments) if arguments.space else None
    commit = upload(api, name, "model", branch, files, arguments)
    print(f"Uploaded to {api.endpoint}/{name}. To load exactly this version:")
    if arguments.adapter:
        print(f"    peft.PeftModel.from_pretrained(model, {name!r}, revision={commit.oid!r})  # model: {base_model}")
    else:
        print(f"    from_pretrained({name!r}, revision={commit.oid!r}, trust_remote_code=True)")
    if space:
        upload(api, name, "space", space, space_files(name, commit.oid), arguments)
        print(f"The page is at {api.endpoint}/spaces/{name}.")


if __name__ == "__main__":
    run_main(main)
