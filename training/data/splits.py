"""Which examples are learned from, which are chosen by, and which are looked at in the end.

Notable:
- Which split an example falls into depends on the seed and on its group alone: what belongs together stays together.
- Within each stratum the splits have the shares that were asked for.
- Splits that are given are taken as they are, but for copies: what stands in the test split is dropped from the others.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from training.cli import option
from training.data.sources import check_sources
from training.errors import UserError

Thing = TypeVar("Thing")

SPLITS = ("train", "validation", "test")


@dataclass
class SplitArguments:
    """What can be asked of the splits of a run."""

    dataset: list[str] = option(["docs"], "What to learn from.")
    validation_dataset: list[str] = option([], "The same, to choose by; if not given, a share of --dataset is held out.")
    test_dataset: list[str] = option([], "The same, for one last look at the end.")
    encoding_errors: str = option(
        "strict", "What to do about bytes that are not UTF-8: strict or replace.", choices=["strict", "replace"]
    )
    validation_fraction: float = option(0.1, "Share that is held out to choose by, if none is given.")
    test_fraction: float = option(0.2, "Share that is held out for the end, if none is given; 0 for none.")


def check_splits(arguments: SplitArguments, endings: tuple[str, ...]) -> list[Path]:
    """Refuse nonsense before any long work; looks at no network.

    Args:
        endings: of the files that a folder stands for.

    Returns:
        The files, which nobody has looked into yet.

    Raises:
        UserError: the shares leave nothing, or a source is not there.
    """
    made = [name for name in SPLITS[1:] if not getattr(arguments, f"{name}_dataset")]
    fractions = {name: getattr(arguments, f"{name}_fraction") for name in made}
    if not 0 <= sum(fractions.values()) < 1 or min(fractions.values(), default=0) < 0:
        given = " and ".join(f"--{name}_fraction {fraction}" for name, fraction in fractions.items())
        raise UserError(f"{given} must be zero or more, and leave something to train on.")
    if fractions.get("validation") == 0:
        raise UserError("--validation_fraction 0 leaves nothing to choose by: give a share, or a --validation_dataset.")
    sources = [*arguments.dataset, *arguments.validation_dataset, *arguments.test_dataset]
    if "docs" in sources and len(sources) > 1:
        raise UserError("--dataset docs is split by modules: give it alone.")
    return check_sources(sources, endings)


def read_given(arguments: SplitArguments, read: Callable[[str], dict[str, list[Thing]]]) -> dict[str, list[Thing]]:
    """The examples of each split as the sources give them; a split that they do not give is empty.

    Args:
        read: gives the splits of a source; all of it is `train` where it has none.

    Raises:
        UserError: a source holds nothing.
    """
    given: dict[str, list[Thing]] = {name: [] for name in SPLITS}
    for name, sources in zip(SPLITS, (arguments.dataset, arguments.validation_dataset, arguments.test_dataset), strict=True):
        for source in sources:
            found = read(source)
            if not found.get(name, found["train"]):
                raise UserError(f"{source}: there is no example in it.")
            given[name] += found.get(name, found["train"])
            for split in SPLITS[1:]:  # a source's own count where no others are given
                if name == "train" and not getattr(arguments, f"{split}_dataset"):
                    given[split] += found.get(split, [])
    return given


def fill_missing_splits(
    given: dict[str, list[Thing]],
    arguments: SplitArguments,
    seed: int,
    group: Callable[[Thing], str],
    stratum: Callable[[Thing], str | None] = lambda thing: None,
) -> dict[str, list[Thing]]:
    """The splits, with those that are not given cut from the training examples.

    Args:
        group: of an example; what is in one group stays in one split.
        stratum: of an example; each is cut in the shares that were asked for.
    """
    fractions = {name: 0.0 if given[name] else getattr(arguments, f"{name}_fraction") for name in SPLITS[1:]}
    train = given["train"]
    made = split_by_group(list(map(group, train)), fractions, seed, list(map(stratum, train)))
    cut = {name: [train[index] for index in indices] for name, indices in made.items()}
    return {name: cut[name] if name == "train" else given[name] or cut[name] for name in SPLITS}


def refuse_empty_splits(splits: dict[str, list[Thing]], arguments: SplitArguments) -> None:
    """Refuse splits that hold nothing, but for a test split that was not asked for."""
    for name, split in splits.items():
        if not split and (name != "test" or arguments.test_fraction or arguments.test_dataset):
            there = ", ".join(f"{other} {len(found):,}" for other, found in splits.items())
            raise UserError(f"nothing is left for the {name} split ({there}): give more examples, or larger shares of them.")


def drawn(things: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Their indices as they are drawn: an order that the seed and each thing by itself decide."""
    key = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    draws = [hashlib.blake2b(thing.encode(), digest_size=8, key=key).digest() for thing in things]
    return sorted(range(len(things)), key=draws.__getitem__)


def split_by_group(
    groups: Sequence[str], fractions: dict[str, float], seed: int, strata: Sequence[str | None] | None = None
) -> dict[str, list[int]]:
    """The indices of each split, drawn stratum by stratum and group by group.

    Args:
        groups: of each example.
        fractions: the shares of validation and test; the rest is train.
        strata: of each example; all are in one if not given.
    """
    sides: dict[str, list[int]] = {name: [] for name in SPLITS}
    members = defaultdict(list)
    for index in drawn(groups, seed, "split"):
        members[strata[index] if strata else None].append(index)
    done = 0  # what one stratum's share is rounded by is made up for by the next
    for indices in members.values():
        shares = {name: round((done + len(indices)) * share) - round(done * share) for name, share in fractions.items()}
        done += len(indices)
        ends = {"test": min(shares["test"], len(indices) - 1)}  # one example at least is learned from
        ends["validation"] = min(ends["test"] + shares["validation"], len(indices) - 1)
        side = ""
        for place, index in enumerate(indices):
            if not place or groups[index] != groups[indices[place - 1]]:
                side = next((name for name, end in ends.items() if place < end), "train")
            sides[side].append(index)
    return {name: sorted(indices) for name, indices in sides.items()}


def drop_leakage(
    splits: dict[str, list[Thing]], what: Callable[[Thing], Hashable]
) -> tuple[dict[str, list[Thing]], dict[str, int]]:
    """Each split without those that are the same as one in a split after it, and how many it lost by that.

    Args:
        what: of an example must not be in two splits.
    """
    kept, copies, later = {}, {}, set[Hashable]()
    for name in reversed(SPLITS):
        kept[name] = [thing for thing in splits[name] if what(thing) not in later]
        copies[name] = len(splits[name]) - len(kept[name])
        later.update(map(what, kept[name]))
    return {name: kept[name] for name in SPLITS}, {name: copies[name] for name in SPLITS}
