"""Training, validation and test splits of documents, examples and conversations.

Notable:
- The split of an example depends on the seed and its group alone, not on the order of the data. A group is never divided.
- Each split gets its fraction of every stratum. Validation groups come from the beginning of a pseudo-random order and test
  groups from its end, so changing one fraction does not change the other split.
- Splits that are given are used as they are, except that training and validation lose what is also in a later split.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from training.cli import option
from training.data.encoding import encoding_errors_option, encoding_of, encoding_option
from training.data.sources import SPLITS, check_sources
from training.errors import UserError

Item = TypeVar("Item", bound=Any)  # an example or a conversation, with its `group`
Splits = dict[str, list[Item]]  # train, validation and test
Key = Callable[[Item], Hashable]


def split_seed_option() -> Any:
    return option(0, "seed of the split, apart from --seed: runs with any --seed hold out the same data", minimum=0)


@dataclass
class SplitArguments:
    """Arguments about the splits of a run."""

    dataset: list[str] = option(["docs"], "training data")
    validation_dataset: list[str] = option([], "validation data; default: a fraction of --dataset is held out")
    test_dataset: list[str] = option([], "test data, evaluated once, at the end; default: a fraction of --dataset")
    encoding: str = encoding_option()
    encoding_errors: str = encoding_errors_option()
    validation_fraction: float = option(0.1, "fraction held out for validation if no data is given for it", minimum=0, below=1)
    test_fraction: float = option(0.2, "fraction held out for the test if no data is given for it; 0: none", minimum=0, below=1)
    split_seed: int = split_seed_option()


def check_splits(arguments: SplitArguments, endings: tuple[str, ...]) -> list[Path]:
    """Validate the arguments before any data is read, without network access, and return the local files."""
    fractions = {it: getattr(arguments, f"{it}_fraction") for it in SPLITS[1:] if not getattr(arguments, f"{it}_dataset")}
    check_fractions(fractions)
    if fractions.get("validation") == 0:
        raise UserError("--validation_fraction 0 leaves nothing to validate with: pass a fraction or a --validation_dataset.")
    sources = [*arguments.dataset, *arguments.validation_dataset, *arguments.test_dataset]
    if "docs" in sources and len(sources) > 1:
        raise UserError("--dataset docs is split by modules and cannot be combined with other sources.")
    encoding_of(arguments)
    return check_sources(sources, endings)


def check_fractions(fractions: dict[str, float]) -> None:
    """Raise `UserError` if the held-out fractions leave nothing to train on."""
    if sum(fractions.values()) >= 1:
        given = " and ".join(f"--{name}_fraction {fraction}" for name, fraction in fractions.items())
        raise UserError(f"{given} leave nothing to train on: together they must be below 1.")


def read_given(arguments: SplitArguments, read: Callable[[str], Splits[Item]]) -> Splits[Item]:
    """Read the splits that the sources provide; the others are empty. `read` returns those of a source, at least `train`.

    Raises:
        UserError: a source is empty.
    """
    given: Splits[Item] = {name: [] for name in SPLITS}
    for name, sources in zip(SPLITS, (arguments.dataset, arguments.validation_dataset, arguments.test_dataset), strict=True):
        for source in sources:
            splits = read(source)
            items = splits.get(name, splits["train"])
            if not items:
                raise UserError(f"{source} has no examples.")
            given[name] += items
            for other in SPLITS[1:]:  # the source's own splits are used unless there are sources for them
                if name == "train" and not getattr(arguments, f"{other}_dataset"):
                    given[other] += splits.get(other, [])
    return given


def split_items(
    given: Splits[Item], arguments: SplitArguments, key: Key[Item], stratum: Key[Item] = lambda item: None
) -> tuple[Splits[Item], dict[str, int]]:
    """Hold out part of the training items for each split that is empty, the fraction of every stratum, then `drop_leakage`.

    Raises:
        UserError: a split is empty, except for a test split that was not requested.
    """
    fractions = {name: 0.0 if given[name] else getattr(arguments, f"{name}_fraction") for name in SPLITS[1:]}
    train = given["train"]
    indices = split_indices((item.group.encode() for item in train), fractions, arguments.split_seed, list(map(stratum, train)))
    made = {name: [train[index] for index in indices[name]] for name in SPLITS}
    splits, dropped = drop_leakage({**made, **{name: given[name] for name in SPLITS[1:] if given[name]}}, key)
    for name, split in splits.items():
        if not split and (name != "test" or arguments.test_fraction or arguments.test_dataset):
            sizes = ", ".join(f"{other} {len(items):,}" for other, items in splits.items())
            reason = f"({sizes}), since examples with the same text or prompt stay in one split"
            raise UserError(f"the {name} split is empty {reason}: pass more different ones, or larger fractions of them.")
    return splits, dropped


def split_indices(
    groups: Iterable[bytes | memoryview], fractions: dict[str, float], seed: int, strata: Sequence[Hashable] | None = None
) -> dict[str, np.ndarray]:
    """Ascending indices of the examples in each split. In every stratum at least one group is left to train on.

    Args:
        groups: one of each example. Only 64 bits of each are kept.
        fractions: of validation and test; the rest is train.
        strata: one of each example; a single one if not given.
    """
    draws = hash_texts(groups, seed, "split")
    order = np.argsort(draws, kind="stable")
    members: dict[Hashable, Any] = {None: order}  # of each stratum, in pseudo-random order
    if strata is not None:
        members = {strata[index]: [] for index in order}
        for index in order:
            members[strata[index]].append(index)
    splits: dict[str, list[np.ndarray]] = {name: [order[:0]] for name in SPLITS}
    total = 0
    for indices in map(np.asarray, members.values()):
        # Rounding the running total makes up in the next stratum for what was rounded off in this one.
        num_done, total = total, total + len(indices)
        sizes = [round(total * fractions[name]) - round(num_done * fractions[name]) for name in SPLITS[1:]]
        end, start = _boundaries(draws[indices], *sizes)
        for name, part in zip(SPLITS, (indices[end:start], indices[:end], indices[start:]), strict=True):
            splits[name].append(part)
    return {name: np.sort(np.concatenate(parts)) for name, parts in splits.items()}


def _boundaries(draws: np.ndarray, num_validation: int, num_test: int) -> tuple[int, int]:
    """End of validation and start of test. No group (a number in `draws`, ascending) is divided; one stays between them."""
    if not len(draws):
        return 0, 0
    end = np.searchsorted(draws, draws[num_validation - 1], "right") if num_validation else 0
    start = np.searchsorted(draws, draws[-num_test], "left") if num_test else len(draws)
    start = max(start, np.searchsorted(draws, draws[0], "right"))
    return int(min(end, np.searchsorted(draws, draws[start - 1], "left"))), int(start)


def hash_texts(texts: Iterable[bytes | memoryview], seed: int, purpose: str) -> np.ndarray:
    """Pseudo-random uint64 (N,); each depends on the seed, the purpose and its own text alone."""
    key = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    digests = (hashlib.blake2b(text, digest_size=8, key=key).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest) for digest in digests), dtype=np.uint64)


def sample_per_class(texts: Sequence[str], classes: Sequence[str], count: int, seed: int, purpose: str) -> list[int]:
    """Ascending indices of at most `count` pseudo-random texts of each class."""
    taken, sampled = Counter[str](), []
    for index in np.argsort(hash_texts((text.encode() for text in texts), seed, purpose), kind="stable").tolist():
        taken[classes[index]] += 1
        if taken[classes[index]] <= count:
            sampled.append(index)
    return sorted(sampled)


def drop_leakage(splits: Splits[Item], key: Key[Item]) -> tuple[Splits[Item], dict[str, int]]:
    """Drop the items whose key is also in a later split; also returns the number of items that each split has lost."""
    kept: Splits[Item] = {}
    later: set[Hashable] = set()
    for name in reversed(SPLITS):
        kept[name] = [item for item in splits[name] if key(item) not in later]
        later.update(map(key, kept[name]))
    return {name: kept[name] for name in SPLITS}, {name: len(splits[name]) - len(kept[name]) for name in SPLITS}
