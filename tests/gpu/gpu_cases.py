"""What the GPU tests share: operators on the GPU inside the oracle rule; how streams, graphs and no waiting show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hebatron_kernels import _native, testing

SLEEP_CYCLES = 1_000_000_000  # half a second at 2 GHz


@dataclass(frozen=True)
class Place:
    device: str
    backend: str  # the backend under test there


def check_oracle(place: Place, op: Callable[..., Any], args: Sequence[Any], *more: Any, **named: Any) -> None:
    """testing.check_oracle with the tensors at the place, so that the oracle and the comparison run there too: for the
    160 million weights of a layer and their gradients they take 100 s on one thread of a CPU."""
    there = [a.to(place.device) if isinstance(a, Tensor) else a for a in args]
    testing.check_oracle(op, there, *more, **named)


def at(place: Place, op: Callable[..., Any], padding: int = 0, **named: Any) -> Callable[..., Any]:
    """`op` for check_oracle: "native" stands for the backend under test, which alone gets the `named` arguments. With
    padding, rows lie inside wider ones that hold NaN."""

    def padded(value: Any) -> Any:
        if padding and isinstance(value, Tensor) and value.dim() == 2:
            around = value.new_full((value.shape[0], padding), torch.nan)
            value = torch.cat([around, value, around], dim=1)[:, padding:-padding]
        return value

    def call(*args: Any, backend: str) -> Any:
        tested = backend == "native"
        return op(
            *map(padded, args), backend=place.backend if tested else backend, **(named if tested else {})
        )

    return call


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]


def assert_same_bits(got: Any, want: Any) -> None:
    for g, w in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(g, w), f"{(g != w).sum().item()} of {g.numel()} elements differ"


def check_stream(call: Callable[[], Any], x: Tensor) -> None:
    """x becomes what it must be late, on a stream of its own: a kernel on any other stream would read the poison."""
    want, source = call(), x.clone()
    torch.cuda.synchronize()
    x.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES // 5)
        x.copy_(source)
        got = call()
    stream.synchronize()
    assert_same_bits(got, want)


def check_graph(call: Callable[[], Any], x: Tensor) -> None:
    """Captured once, replayed on other values."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        got = [t.clone() for t in tensors(captured)]
        assert_same_bits(got, call())


def check_never_waits(call: Callable[[], Any]) -> None:
    """The call returns while the GPU still sleeps, and torch saw no synchronisation either."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP_CYCLES)
        asleep = torch.cuda.Event()
        asleep.record()
        call()
        assert not asleep.query(), "the call waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def recorded_call(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """The keywords with which `call` reaches the compiled module's function `name`."""
    module, seen = _native.cuda_module, {}

    class Recorder:
        def __getattr__(self, attribute: str) -> Any:
            function = getattr(module, attribute)
            if attribute.removesuffix("_or_size") != name:
                return function
            return lambda **keywords: (seen.update(keywords), function(**keywords))[1]

    monkeypatch.setattr(_native, "cuda_module", Recorder())
    call()
    monkeypatch.undo()
    assert seen, f"the call did not reach {name}"
    return seen


def check_pointer_errors(
    monkeypatch: pytest.MonkeyPatch, name: str, pointers: list[str], call: Callable[[], Any]
) -> None:
    """A host pointer and a device that is not there are errors of our own, not faults, and the next call works."""
    keywords = recorded_call(monkeypatch, name, call)
    function, host = getattr(_native.cuda_module, name), torch.zeros(1 << 20, dtype=torch.uint8)
    for pointer in pointers:
        with pytest.raises(ValueError, match=f"{pointer} must be device memory"):
            function(**(keywords | {pointer: host.data_ptr()}))
    with pytest.raises((ValueError, RuntimeError), match="device"):
        function(**(keywords | {"device": torch.cuda.device_count()}))
    if torch.cuda.device_count() > 1:
        with pytest.raises(ValueError, match="must be on device 1"):
            function(**(keywords | {"device": 1}))
    function(**keywords)
    torch.cuda.synchronize()


def need_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} are free")
