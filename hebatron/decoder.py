"""Decoding on a GPU: one more token for every row of a cache, replayed from a CUDA graph.

A token of the 30B model is some 350 launches and more, for which the host needs longer than the GPU for the work. A
graph is bound to the number of its rows and to addresses, so there is one for each bucket (1, 2, 4, 8, ... rows), and
what changes from token to token lies in tensors that stay where they are: ids, lengths, block table, states. Lengths
advance on the GPU; they are written anew only where the cache's list says something else (after a prefill, a reorder).

B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hebatron_kernels import host_reads, named_backend

from .cache import NOTHING, Cache, CacheStep

if TYPE_CHECKING:
    from .model import Hebatron

Run = Callable[[], Tensor]


class CudaGraphs:
    """Makes graphs of functions. They share one pool of memory: only one runs at a time, and what it returns is valid
    until the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        # the stream: a capture that fails leaves its own the current one
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(now), torch.cuda.graph(graph, pool=self.pool):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class Bucket:
    """The step of one number of rows, batch and padding. Its first call is made launch by launch, which loads and warms
    the kernels; before its second it is captured."""

    def __init__(self, model: Hebatron, cache: Cache) -> None:
        rows, device = cache.bucket, cache.device
        self.model = model
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.advance = torch.zeros(rows, dtype=torch.int32, device=device)  # 1, and 0 for padding
        self.table = cache.bucket_layout()[0].to(device)
        states = cache.states(rows)
        self.step = CacheStep(cache, [1] * rows, states, True, self.lengths, self.table, *[NOTHING] * 4)
        self.known: list[int] | None = None  # the cache's lengths that the tensors stand for
        self.replay: Run | None = None
        self.reads: list[str] | None = None  # what keeps it from being captured; None: not known yet

    def load(self, cache: Cache, ids_B: Tensor) -> None:
        self.ids[: len(ids_B)].copy_(ids_B)
        if self.known != cache.lengths:
            table, lengths = cache.bucket_layout()
            self.table.copy_(table)
            self.lengths.copy_(lengths)
            self.advance.copy_(torch.arange(len(lengths)) < cache.batch_size)
        self.known = None  # until the step has succeeded

    def capture(self, graphs: Callable[[Run], Run]) -> None:
        if self.replay is None and self.reads == []:
            self.replay = graphs(self.launch)

    def run(self) -> Tensor:
        if self.replay is not None:
            return self.replay()
        with host_reads() as self.reads:
            return self.launch()

    def launch(self) -> Tensor:
        logits_BV = self.model.next_logits(self.ids, self.step)
        self.lengths.add_(self.advance)
        return logits_BV


class Decoder:
    """Gives the logits behind one more token of every row of a cache.

    The first token in a bucket is computed launch by launch, the others replay its graph. The graphs are made again
    when the cache had to move (it grew, a snapshot was restored), another backend was named or the model's weights
    lie elsewhere. Prefill, `reorder`, `cut` and `restore` may come between two tokens. A weight that is replaced by
    itself, instead of written to, needs a new decoder.

    A form that reads the GPU on the host (`hebatron_kernels.host_reads`: the `reference` backend; torch's grouped_mm
    other than bf16 on compute capability 9.x and 10.x) cannot be captured: every token is then computed launch by
    launch, and `uncaptured` says why.

    Args:
        model: on a GPU.
        cache: of this model; `new_cache` holds the rows of a bucket there.
        graphs: makes what captures; a test without a GPU gives its own.

    Raises:
        ValueError: the model is not on a GPU.
    """

    def __init__(
        self,
        model: Hebatron,
        cache: Cache,
        graphs: Callable[[torch.device], Callable[[Run], Run]] = CudaGraphs,
    ) -> None:
        if graphs is CudaGraphs and model.device.type != "cuda":
            raise ValueError(f"decoder: model must be on a GPU, got {model.device}")
        self.model, self.cache = model, cache
        self._new_graphs = graphs
        self._key: object = None
        self._buckets: dict[int, Bucket] = {}

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Feed one token a row.

        Args:
            ids_B: (B,) integers on the model's device, trusted to be tokens: looking would wait for the GPU.

        Returns:
            (B, V) fp32, valid until the next call. Nothing waits for the GPU.

        Raises:
            ValueError: as `Hebatron.forward` for the cache: a full context, another model's cache; or ids of another
                shape or device. The cache is then as it was.
        """
        model, cache = self.model, self.cache
        new = [1] * cache.batch_size
        if tuple(ids_B.shape) != (len(new),) or ids_B.device != model.device:
            got = f"{tuple(ids_B.shape)} on {ids_B.device}"
            raise ValueError(f"decoder: ids_B must be ({len(new)},) on {model.device}, got {got}")
        cache.check_fits(model.config, model.device, new)
        cache.make_room(new, model.compute_dtype)
        key = (cache.moves, named_backend(), model.backbone.embeddings.weight.data_ptr())
        if key != self._key:
            self._buckets = {}  # first: graphs hold memory
            self._key, self._graphs = key, self._new_graphs(model.device)
        if cache.bucket not in self._buckets:
            self._buckets[cache.bucket] = Bucket(model, cache)
        bucket = self._buckets[cache.bucket]
        bucket.load(cache, ids_B)
        bucket.capture(self._graphs)
        cache.broken = True
        logits_BV = bucket.run()
        cache.advance(new)
        bucket.known = cache.lengths
        return logits_BV[: len(new)]

    @property
    def uncaptured(self) -> list[str]:
        """What keeps the current bucket's step from being captured; [] where nothing does or no token was fed yet."""
        bucket = self._buckets.get(self.cache.bucket)
        return [] if bucket is None or bucket.reads is None else sorted(set(bucket.reads))


def one_more_token(model: Hebatron, cache: Cache) -> Callable[[Tensor], Tensor | None]:
    """(B,) ids to (B, 1, V) logits: a `Decoder` on a GPU, the model's forward on the CPU, which also checks the ids."""
    if model.device.type == "cuda":
        decoder = Decoder(model, cache)
        return lambda ids_B: decoder(ids_B)[:, None]
    return lambda ids_B: model(ids_B[:, None], cache=cache, logits_to_keep=1).logits
