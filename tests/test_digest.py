"""A run in sections: what is said is what the frames say, and the layers are judged as described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import inventory
from torch import nn
from written import record_of, write

import paramwatch
from paramwatch import digest
from paramwatch.digest import SECTIONS, Reading, Section, sections
from paramwatch.epoch import Epoch
from paramwatch.loading import load
from paramwatch.record import Finding
from paramwatch.run import Run
from paramwatch.standing import standing
from paramwatch.store import DiskFolder, Store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write(
        tmp_path_factory.mktemp("run"),
        [f"{layer}.weight" for layer in range(12)] + ["head.weight"],
        range(60),
        tied={"3.weight": ["head.weight"]},
        spoilt=lambda step: [5] if step == 50 else [],
        states={7: "none", 8: "zero", 9: "frozen"},
        skipped=[4, 11],
        findings=[Finding(50, "first_nonfinite", "5.weight", "the first NaN")],
    )


def test_layers_come_from_worst_to_best_as_a_computation_by_hand_has_them(run: Run) -> None:
    found = standing(run, slice(20, None))

    ratios = run.frame("update_ratio", by="layer", steps=slice(20, None)).median()
    middle = ratios.dropna().median()
    distance = np.log(ratios / middle).abs().drop(index=["5", "7", "8", "9"])
    assert [layer.name for layer in found.layers] == ["5", "7", "8", *distance.sort_values(ascending=False).index, "9"]
    for layer in found.layers:
        assert layer.update_ratio == pytest.approx(ratios[layer.name], nan_ok=True, rel=1e-12)
    said = {layer.name: layer.verdict for layer in found.layers}
    assert [said[name] for name in ("5", "7", "8", "9")] == ["not finite in 1 step", "no gradient", "zero gradient", "frozen"]
    fastest = ratios[distance.index].idxmax()
    assert said[fastest] == f"{ratios[fastest] / middle:.1f}x faster"


def test_of_a_run_on_a_gpu_it_is_said_what_its_stream_lost(tmp_path: Path, run: Run) -> None:
    rows, store = inventory("a"), Store(DiskFolder(tmp_path / "paramwatch"), max_bytes=10**9)
    for record in (record_of(step, rows) for step in range(3)):
        store.write(replace(record, steps={**record.steps, "overhead_host_us": 9.0}))
    store.close()
    on_gpu, on_cpu = (next(iter(sections(each))).said for each in (load(tmp_path), run))

    assert "watching took 30 µs of the GPU's stream at the median step" in on_gpu
    assert "watching took 30 µs of the training thread at the median step" in on_cpu


def test_sections_say_what_the_frames_say(run: Run) -> None:
    found = {section.key: section for section in sections(run)}

    assert list(found) == ["watched", "totals", "ties", "layers", "skipped", "nonfinite", "findings"]
    assert found["watched"].said[0] == "Net: 12 rows (13 names), 48 elements, 48 of them trained, 192 bytes"
    assert found["watched"].said[1].startswith("60 recorded steps (0 to 59) in 59 s; the last at 2023-11-14 22:14:19")
    assert found["skipped"].data == {"count": 2, "steps": [4, 11]}
    assert found["nonfinite"].data == {"count": 1, "steps": [50]}
    assert found["ties"].data == [{"names": ["3.weight", "head.weight"], "kind": "parameter", "numel": 4, "bytes_saved": 16}]
    norms = run.steps["grad_norm"]
    assert found["totals"].data["grad_norm"] == pytest.approx(
        {"last": norms.iloc[-1], "median": norms.median(), "min": norms.min(), "max": norms.max()}, rel=1e-12
    )
    assert [layer["layer"] for layer in found["layers"].data["worst"]][:3] == ["5", "7", "8"]
    assert found["findings"].data[0]["message"] == "the first NaN"


def test_memory_that_parameters_share_is_taken_once_and_counts_as_saved(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["c"], net["b"].weight.data = net["a"], net["a"].weight.data
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, tmp_path):
        net["a"](torch.ones(1, 4)).sum().backward()
        optimizer.step()
    found = {section.key: section for section in sections(load(tmp_path))}

    assert found["watched"].data["bytes"] == paramwatch.summary(net).totals.bytes == 64
    assert found["ties"].said[0] == "2 tie groups, 128 bytes saved"
    assert [tie["bytes_saved"] for tie in found["ties"].data] == [64, 64]


def test_what_there_is_nothing_to_say_of_is_left_out(tmp_path: Path) -> None:
    plain = write(tmp_path, ["a.w", "b.w"], range(3))
    assert [section.key for section in sections(plain)] == ["watched", "totals", "layers", "findings"]


def test_a_section_is_added_as_one_function(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(reading: Reading) -> Section:
        return Section("mine", "Mine", (f"{len(reading.steps)} steps",))

    monkeypatch.setattr(digest, "SECTIONS", (*SECTIONS, mine))
    assert list(sections(run))[-1].said == ("60 steps",)


def test_long_tables_are_cut_and_say_so(run: Run) -> None:
    findings = [Finding(step, "rule", "5.weight", "look") for step in range(30)]
    many = Reading(run, run.steps, run.parameters, slice(0, None))
    assert digest.findings(many).grid is not None
    cut = digest._first_lines(Section("findings", "Findings", grid=digest.Grid(("step",), [(str(f.step),) for f in findings])), 10).grid
    assert cut is not None
    assert (len(cut.lines), cut.more) == (10, "… and 20 more")


def test_a_summary_reads_the_steps_once_and_the_layers_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    block = Epoch.block

    def counted(self: Epoch, *args: Any, **options: Any) -> Any:
        found = block(self, *args, **options)
        read.append(len(found.step))
        return found

    monkeypatch.setattr(Epoch, "block", counted)
    assert list(sections(run))
    assert len(read) == 2
