"""Batch samplers for a whole run, over all its epochs.

Notable:
- Which rows make up batch n depends on the seed and on n alone, not on the number of processes. `accelerate.skip_first_batches`
  therefore continues a run exactly where it was interrupted.
- `LengthGroupedBatchSampler` sorts a pool of random batches by length: a quarter of the padding, and nearly as random.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

POOL = 16  # steps


class MixtureBatchSampler(Sampler[list[int]]):
    """Batches of indices into concatenated datasets with these sizes; `batch_size` counts the rows of all processes.

    Args:
        probabilities: of drawing from each dataset. By default they form a single one, of which each row comes once an epoch.
        with_replacement: draw rows independently, as nanoGPT does, instead of each once an epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        num_batches: int,
        seed: int,
        probabilities: Sequence[float] | None = None,
        with_replacement: bool = False,
    ):
        if probabilities is None:
            sizes, probabilities = [sum(sizes)], [1.0]
        self.sizes, self.batch_size, self.num_batches, self.seed = sizes, batch_size, num_batches, seed
        self.probabilities, self.with_replacement = probabilities, with_replacement

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        streams = [self._stream(source, size) for source, size in enumerate(self.sizes)]
        offsets = np.cumsum([0, *self.sizes]).tolist()
        generator = np.random.default_rng((self.seed, 2**32))
        for _ in range(self.num_batches):
            sources = generator.choice(len(self.sizes), size=self.batch_size, p=self.probabilities).tolist()
            yield [offsets[source] + next(streams[source]) for source in sources]

    def _stream(self, source: int, size: int) -> Iterator[int]:
        """Rows of one dataset in the order in which they are drawn, without end."""
        for epoch in itertools.count():
            generator = np.random.default_rng((self.seed, epoch, source) if source else (self.seed, epoch))
            indices = generator.integers(size, size=4096) if self.with_replacement else generator.permutation(size)
            for part in np.array_split(indices, max(1, len(indices) // 4096)):
                yield from part.tolist()


class ShardedBatchSampler(Sampler[list[int]]):
    """The rows of each batch that one process reads: consecutive ones, at most one more than another process reads.

    Accelerate's own shards need batches that are a multiple of the number of processes. The loss does not: each process adds
    its part of the sum, which is divided by the items of all.
    """

    def __init__(self, batches: Any, num_processes: int, process_index: int):
        self.batches, self.num_processes, self.process_index = batches, num_processes, process_index
        self.batch_size = batches.batch_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            first, end = (len(batch) * index // self.num_processes for index in (self.process_index, self.process_index + 1))
            yield batch[first:end]


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Full batches of examples of similar length; those left over from an epoch are in the first batch of the next.

    An index continues from epoch to epoch: `index % len(lengths)` is the example, `index // len(lengths)` the epoch.

    Args:
        accumulation: batches per optimizer step. The rows of a step depend on their number only, not on its division.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, num_batches: int, seed: int, accumulation: int = 1):
        self.lengths, self.batch_size, self.num_batches, self.seed = lengths, batch_size, num_batches, seed
        self.accumulation = accumulation

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size
        batches = (step[start : start + size] for step in self._steps() for start in range(0, len(step), size))
        return itertools.islice(batches, self.num_batches)

    def _steps(self) -> Iterator[list[int]]:
        generator, count = np.random.default_rng(self.seed), len(self.lengths)
        size = self.batch_size * self.accumulation
        draws: list[int] = []
        for first in itertools.count(step=count):
            num_left = len(draws)
            draws += (generator.permutation(count) + first).tolist()
            if num_left and len(draws) >= size:
                yield draws[:size]
                draws = draws[size:]
            while len(draws) >= size:
                num_steps = min(POOL, len(draws) // size)
                pool, draws = draws[: num_steps * size], draws[num_steps * size :]
                pool.sort(key=lambda draw: self.lengths[draw % count])
                for position in generator.permutation(num_steps).tolist():
                    yield pool[position * size : (position + 1) * size]
