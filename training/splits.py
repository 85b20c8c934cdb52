"""Which examples are learned from, which are chosen by, and which are looked at in the end.

Notable:
- Which split an example falls into depends on the seed and on its group alone: what belongs together stays together.
- Within each stratum the splits have the shares that were asked for.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")

SPLITS = ("train", "validation", "test")


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


def without_copies(
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
