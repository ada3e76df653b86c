"""doctor: the table of operators and its self-check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hebatron_kernels
from hebatron import cli, doctor


def test_doctor_checks_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = doctor.examine()
    assert [row.name for row in diagnosis.operators] == list(hebatron_kernels.OPERATORS)
    assert not diagnosis.problems
    assert all(
        row.backend in hebatron_kernels.explain(row.name, **doctor.small_cases()[row.name]())
        for row in diagnosis.operators
    )
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "_cpu" in out and "rms_norm" in out and "agree with their fp64 reference" in out


def test_doctor_fails_on_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hebatron_kernels.rms_norm

    def wrong(backend: str | None = None, **kwargs: Any) -> Any:
        y_TD: Any = right(**kwargs, backend=backend)
        return y_TD * (1.0 if backend == "reference" else 1.001)

    monkeypatch.setattr(hebatron_kernels, "rms_norm", wrong)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "problem: rms_norm[" in out


def test_doctor_sees_nan_and_wrong_shapes() -> None:
    one = torch.ones(2)
    assert not doctor.OperatorRow("x", "torch", (), doctor._largest_difference([one * torch.nan], [one])).ok
    assert not doctor.OperatorRow("x", "torch", (), doctor._largest_difference([torch.ones(3)], [one])).ok
    assert doctor.OperatorRow("x", "torch", (), doctor._largest_difference([one], [one])).ok


def test_doctor_counts_openmp_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "7f00-7f01 r-xp 00000000 00:00 1    {}\n"
    paths = [
        "/usr/lib/libgomp.so.1",
        "/usr/lib/libgomp.so.1",
        "/torch/lib/libgomp-a1.so.1",
        "/usr/lib/libc.so.6",
    ]
    (tmp_path / "maps").write_text(
        "".join(line.format(path) for path in paths) + "7f02-7f03 rw-p 0 00:00 0\n"
    )
    monkeypatch.setattr(doctor, "MAPS", tmp_path / "maps")
    assert doctor.openmp_copies() == ["/torch/lib/libgomp-a1.so.1", "/usr/lib/libgomp.so.1"]
    assert any("OpenMP runtimes are mapped" in problem for problem in doctor.examine().problems)
    monkeypatch.setattr(doctor, "MAPS", tmp_path / "absent")
    assert doctor.openmp_copies() is None
