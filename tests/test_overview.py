"""`summary`: what it says of a model, that it leaves the model alone, and how it prints."""

from __future__ import annotations

import gc
import io
import random
import re
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import (
    CASES,
    ODD_NAMES,
    Case,
    OddNames,
    TiedHead,
    frozen_layer,
    lazy,
    nested_with_spaces,
    one_parameter_in_two_modules,
    shared_mlp,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import reals
from verdicts import plain

import paramwatch
from paramwatch import ParamWatchError, summary
from paramwatch.measure import native
from paramwatch.sampling import EXACT, EXACT_COMPILED, EXACT_TOGETHER, Limits

Golden = Callable[[str, str], None]


class Transformer(nn.Module):
    """Two encoder layers between an embedding and a head that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(1, 12, 16))
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(12, 12))


def book(fill: Callable[[nn.Linear], object]) -> nn.Sequential:
    """The book's perceptron with one hidden layer, filled by a function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    net.apply(lambda module: fill(module) if isinstance(module, nn.Linear) else None)
    return net


def normal(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


def constant(layer: nn.Linear) -> None:
    nn.init.constant_(layer.weight, 1)
    nn.init.zeros_(layer.bias)


# ---- what it says ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "lazy"], ids=lambda case: case.name)
def test_statistics_are_those_of_the_tensors(case: Case) -> None:
    model, _ = case.build()
    frame = summary(model).frame

    assert list(frame.index) == [name for name, _ in model.named_parameters()]
    for name, tensor in model.named_parameters():
        x, row = reals(tensor), frame.loc[name]
        assert (row["shape"], row["numel"], row["dtype"]) == (tuple(tensor.shape), tensor.numel(), str(tensor.dtype).removeprefix("torch."))
        if len(x):
            expected = [x.mean(), x.std(), x.min(), x.max(), (x == 0).mean()]
            assert list(row[["mean", "std", "min", "max", "zero_frac"]]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_tied_row_comes_once_with_its_other_names_and_its_group() -> None:
    found = summary(shared_mlp())

    assert found.frame["aliases"]["2.weight"] == ("4.weight",)
    assert list(found.frame["tie_group"].fillna(-1)) == [-1, -1, 0, 1, -1, -1]
    assert found.ties == paramwatch.tie_groups(shared_mlp())
    totals = found.totals
    assert (totals.parameters, totals.with_repeats, totals.trainable, totals.bytes, totals.bytes_saved) == (121, 193, 121, 484, 288)


def test_equal_values_that_are_not_tied_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].load_state_dict(net[0].state_dict())

    assert summary(net).totals.bytes_saved == 0
    assert summary(one_parameter_in_two_modules()).totals.bytes_saved == 144


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_bytes_of_sparse_parameters_are_those_that_they_store_and_packed_weights_are_said_not_to_be_counted() -> None:
    eye = torch.eye(64)
    net = nn.ParameterList([nn.Parameter(eye.to_sparse()), nn.Parameter(eye.to_sparse_csr()), nn.Parameter(eye.to_sparse_csc())])
    # values in 4 bytes each, indices in 8: two for an element, or one and 65 starts
    assert summary(net).totals.bytes == 64 * (4 + 16) + 2 * (64 * (4 + 8) + 65 * 8)
    quantised = summary(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 2), nn.Linear(2, 2)))
    assert (quantised.totals.packed, quantised.totals.parameters) == (1, 6)
    assert "1 packed weight of quantised layers not counted" in str(quantised)


def test_memory_that_separate_parameters_share_is_counted_once_and_totals_agree_with_the_groups() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.data)
    net[2].weight = net[0].weight
    found = summary(net)

    assert [(tie.kind, tie.bytes_saved) for tie in found.ties] == [("parameter", 256), ("storage", 256)]
    # three separate weights would take 768
    assert (found.totals.bytes, found.totals.bytes_saved) == (256, 512)


def test_modules_buffers_and_frozen_parameters_are_counted() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[0].requires_grad_(False)
    found = summary(net)

    assert (found.totals.trainable, found.totals.buffers, found.totals.buffer_elements, found.totals.buffer_bytes) == (6, 3, 7, 32)
    assert list(found.frame["trainable"]) == [False, False, True, True]
    assert list(found.frame["module_type"]) == ["Linear", "Linear", "BatchNorm1d", "BatchNorm1d"]
    assert list(found.frame["module"]) == ["0", "0", "1", "1"]


def test_a_gradient_is_none_zero_or_set() -> None:
    net = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2, bias=False)
    )
    (net[0].weight.sum() + net[1](torch.tensor([1])).sum() + 0 * net[2](torch.tensor([1])).sum()).backward()

    assert list(summary(net).frame["gradient"]) == ["set", "set", "zero", "none"]


def test_lazy_and_meta_parameters_say_so() -> None:
    found = summary(nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 2, device="meta")))

    assert [text.split(":")[0] for text in found.frame["looks_like"]] == ["lazy"] * 4 + ["on the meta device"] * 2
    assert (found.totals.lazy, found.totals.parameters) == (4, 12)
    assert found.frame["shape"].tolist()[:1] == [None]
    assert found.warnings == {}


@pytest.mark.usefixtures("no_kernel")
def test_a_large_tensor_is_looked_at_through_a_sample_and_says_so() -> None:
    torch.manual_seed(0)
    net = nn.Linear(1024, EXACT // 1024 + 1)
    row = summary(net).frame.loc["weight"]

    assert not row["exact"]
    assert row["looks_like"] == "PyTorch default (uniform ±0.0312)"
    assert row["std"] == pytest.approx(reals(net.weight).std(), rel=0.03)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_and_constants_of_a_large_tensor_are_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(1024, EXACT // 1024 + 1, bias=False, dtype=dtype) for _ in range(3)])
    nn.init.zeros_(net[0].weight).data[5, 7] = 1
    nn.init.constant_(net[1].weight, 0.5).data[77, 5] = 0.25
    net[2].weight.data[3, 3] = -7
    frame = summary(net).frame

    assert "all zeros" not in summary(net).warnings.get("0.weight", "")
    assert summary(net).warnings["1.weight"].startswith("1,024 of 1,025 units have the same weights")
    assert list(frame["max"])[:2] == [1, 0.5]
    assert list(frame["min"])[1:] == [0.25, -7]
    assert frame["looks_like"]["2.weight"].startswith("unlike any standard one")
    assert not frame["exact"].any()


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: there is no kernel")
def test_the_compiled_kernel_measures_large_tensors_whole() -> None:
    net = nn.Linear(2048, EXACT // 1024)
    with torch.no_grad():
        net.weight[5, 7] = 42
    row = summary(net).frame.loc["weight"]

    assert row["exact"]
    assert row["std"] == pytest.approx(reals(net.weight).std(), rel=1e-9)
    assert Limits.of([EXACT] * (EXACT_COMPILED // EXACT)).exact == EXACT_COMPILED
    assert Limits.of([EXACT] * (EXACT_COMPILED // EXACT + 1)).exact < EXACT


@pytest.mark.usefixtures("no_kernel")
def test_of_a_large_model_only_small_tensors_are_measured_whole() -> None:
    torch.manual_seed(0)
    rows = EXACT_TOGETHER // (1024 * 1000) + 1
    net = nn.ModuleList([nn.Linear(1024, 1000) for _ in range(rows)])
    net[3].weight.data[5, 7] = 3
    frame = summary(net).frame
    weights = frame[frame["numel"] > 1000]

    assert list(frame["exact"]) == [False, True] * rows
    assert (weights["looks_like"].drop("3.weight").map(plain) == "PyTorch default (uniform ±0.0312)").all()
    assert frame["max"]["3.weight"] == 3
    assert list(weights["min"]) == [float(layer.weight.detach().min()) for layer in net]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        summary(nn.Linear(2, 2))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_more_rows_are_judged_on_fewer_elements_each() -> None:
    judged = {rows: Limits.of([100] * rows).judged for rows in (0, 1, 2048, 4096, 15_000)}

    assert judged == {0: 4096, 1: 4096, 2048: 4096, 4096: 2048, 15_000: 1024}


@pytest.mark.usefixtures("no_kernel")
def test_what_is_estimated_from_a_sample_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)

    assert re.search(r"~0\.018\d?\b", str(summary(nn.Linear(1024, EXACT // 1024 + 1))))
    assert "~" not in str(summary(nn.Linear(1024, 64)))


@pytest.mark.parametrize("shape", [(200, 300), (1100, 1000)], ids=["measured", "sampled"])
def test_sparse_is_told_by_its_columns_whatever_the_size(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Linear(*shape, bias=False)
    nn.init.sparse_(net.weight, 0.3)

    assert re.search(r"30 % zeros in each column, else normal\(0, 0.01\)", summary(net).frame["looks_like"]["weight"])


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e-60, 1e60], ids=str)
def test_a_scale_that_is_absurd_is_said_shortly(scale: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(30, 30, bias=False, dtype=torch.float64)
    net.weight.data *= scale
    warning = summary(net).warnings["weight"]

    assert re.match(r"its size is (inf|\de\+\d+) times (above|below)", warning)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [4, 1100], ids=["small", "sampled"])
def test_an_element_that_is_not_finite_is_never_missed(size: int, value: float) -> None:
    net = nn.Linear(size, size)
    net.weight.data[size // 3, size // 2] = value

    assert summary(net).warnings["weight"].startswith("NaN or infinite elements (1)")


@pytest.mark.parametrize("wrong", [None, 3, torch.ones(2), nn.Linear])
def test_something_else_than_a_module_is_refused(wrong: object) -> None:
    with pytest.raises(ParamWatchError, match=r"summary takes an nn\.Module, not"):
        summary(wrong)  # type: ignore[arg-type]


# ---- warnings -------------------------------------------------------------------------------


def test_a_constant_weight_does_not_break_the_symmetry_and_one_unit_has_none_to_break() -> None:
    warnings = summary(book(constant)).warnings

    assert list(warnings) == ["0.weight"]
    assert "symmetry is not broken" in warnings["0.weight"]


@pytest.mark.parametrize(
    ("layer", "several"),
    [
        (nn.ConvTranspose2d(1, 8, 3), True),
        (nn.ConvTranspose2d(8, 1, 3), False),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), False),
        (nn.ConvTranspose2d(2, 8, 3, groups=2), True),
        (nn.Conv2d(8, 8, 3, groups=8), False),
        (nn.Conv2d(8, 1, 3), False),
        (nn.Conv2d(1, 8, 3), True),
    ],
    ids=str,
)
def test_the_units_of_a_convolution_are_the_outputs_of_a_group(layer: nn.Module, several: bool) -> None:
    nn.init.constant_(layer.weight, 0.2)

    assert ("symmetry" in summary(layer).warnings.get("weight", "")) == several


def test_a_scale_ten_times_off_is_called_out() -> None:
    small, large = summary(book(normal)).warnings, summary(book(lambda layer: nn.init.constant_(layer.weight, 42))).warnings

    assert re.match(r"its size is \d\d times below PyTorch's default", small["0.weight"])
    assert "206 times above" in large["2.weight"]


def test_zeros_matter_in_weights_and_in_the_scale_of_a_norm_only() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Embedding(3, 3))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)

    assert list(summary(net).warnings) == ["0.weight", "1.weight", "2.weight"]
    assert list(summary(net.requires_grad_(False)).warnings) == []


def test_an_embedding_that_is_also_a_head_is_judged_as_a_head() -> None:
    embed, head = nn.Embedding(50, 400), nn.Linear(400, 50, bias=False)
    head.weight = embed.weight

    assert summary(embed).warnings == {}
    seen = summary(nn.ModuleDict({"embed": embed, "head": head}))
    assert seen.warnings == {}
    assert seen.notes["embed.weight"].startswith("head.weight as a weight of Linear is 35 times")
    assert seen.notes["embed.weight"].endswith("signals blow up, unless the model scales them")


@pytest.mark.parametrize(
    "make",
    [
        shared_mlp,
        Transformer,
        nested_with_spaces,
        frozen_layer,
        lambda: nn.LSTM(8, 8),
        lambda: nn.Conv2d(3, 64, 7),
        lambda: nn.Conv2d(8, 8, 3, groups=8),
        lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
        lambda: nn.Linear(4096, 2),
    ],
)
def test_freshly_made_modules_have_nothing_to_warn_of(make: Callable[[], nn.Module]) -> None:
    assert summary(make()).warnings == {}


# ---- leaves the model alone -----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_changed_run_or_drawn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = case.build()
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("the model was run"))
    before = {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    hooks = hooks_on(model)
    str(summary(model))

    assert {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert hooks_on(model) == hooks


def hooks_on(model: nn.Module) -> list[int]:
    """How many hooks each module has."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


def test_the_same_model_gives_the_same_summary() -> None:
    model = Transformer()

    assert str(summary(model)) == str(summary(model))


# ---- how it prints --------------------------------------------------------------------------


MODELS: dict[str, Callable[[], nn.Module]] = {
    "shared_mlp": shared_mlp,
    "transformer": Transformer,
    "lazy": lambda: nn.Sequential(lazy(), nn.BatchNorm1d(2)),
    "odd_names": OddNames,
    "constant": lambda: book(constant),
    "storage": lambda: views(),
}


def views() -> nn.Module:
    """Two parameters on one piece of memory."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight.data = net[0].weight.data
    return net


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", MODELS)
def test_the_printed_table(name: str, width: int, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    torch.manual_seed(0)

    golden(f"summary_{name}_{width}.txt", str(summary(MODELS[name]())))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("name", MODELS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))

    assert max(map(columns_of, str(summary(MODELS[name]())).splitlines())) <= max(width, 40)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_verdict_is_printed_whole_and_other_columns_give_way_to_it(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    torch.manual_seed(0)
    found = summary(nn.LSTM(32, 16))
    lines = str(found).splitlines()
    at = next(line for line in lines if line.startswith("parameter")).index("looks like")

    said = " ".join(line[at:].strip() for line in lines[lines.index("─" * width) + 1 : -2])
    assert width - at >= 24
    assert all(look in said for look in found.frame["looks_like"])
    assert ("no room for shape, std" in " ".join(lines)) == (width == 40)


def columns_of(line: str) -> int:
    """Columns of a terminal, counted one character at a time."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in line)


def test_a_long_name_keeps_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    net = nn.ParameterDict({"start" + 100 * "x" + "end": nn.Parameter(torch.zeros(2))})

    assert re.search(r"start\w+…\w+end ", str(summary(net)))


def test_a_model_without_parameters_prints() -> None:
    assert "ReLU: no parameters" in str(summary(nn.ReLU()))


def test_a_tree_too_long_to_read_is_cut_and_the_frame_is_not() -> None:
    found = summary(nn.ModuleList([nn.Linear(1, 1) for _ in range(600)]))

    assert "… and 800 more lines" in str(found)
    assert len(found.frame) == 1200


def test_a_class_name_stays_on_its_line() -> None:
    odd = type("Two\nlines\x1b[31m", (nn.Sequential,), {})
    said = str(summary(odd(odd(nn.Linear(2, 2)))))

    assert "\x1b" not in said
    assert said.count("Two\\nlines") == 2


def test_html_escapes_every_name() -> None:
    found = nn.ParameterDict({"<script>alert(1)</script>": nn.Parameter(torch.ones(2)), "a&b": nn.Parameter(torch.ones(2))})
    html = summary(found)._repr_html_()

    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a&amp;b" in html


def test_html_shows_every_name_and_what_is_tied() -> None:
    html = summary(TiedHead())._repr_html_()

    assert "= embed.weight" in html
    assert all(name.replace("\n", "\\n") in summary(OddNames())._repr_html_() for name in ODD_NAMES)


def test_a_child_may_have_a_dot_in_its_name() -> None:
    net = nn.Module()
    net._modules["block.0"] = nn.Linear(4, 4)

    assert "block.0.weight" in summary(net).frame.index
    assert "weight" in str(summary(net))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_it_prints_where_not_every_sign_can_be_written(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    net = nn.ModuleDict({"déjà": nn.Linear(16, 16), "層": nn.Linear(2, 2)})
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", out)
        print(summary(net))
        out.flush()

    said = out.buffer.getvalue().decode(encoding)
    assert "PyTorch default (uniform" in said
    assert "-" * 40 in said


def test_a_fake_model_is_summed_up_without_a_warning() -> None:
    with FakeTensorMode():
        net = nn.Linear(3, 3)

    assert "fake: no values" in str(summary(net))


def test_a_constant_matrix_of_a_layer_of_ones_own_is_warned_of_and_zeros_are_not() -> None:
    net = nn.Module()
    net.W, net.position, net.scale = (nn.Parameter(torch.full(*args)) for args in (((4, 4), 0.1), ((4, 4), 0.0), ((1, 4), 1.0)))

    assert list(summary(net).warnings) == ["W"]
    assert "symmetry is not broken" in summary(net).warnings["W"]


def test_of_one_element_no_law_is_said_to_fit() -> None:
    net = nn.ParameterList([nn.Parameter(torch.tensor(2.5))])

    assert summary(net).frame["looks_like"].tolist() == ["too small to tell: one element"]


def test_a_summary_is_equal_to_itself_alone_and_can_be_hashed() -> None:
    one = summary(nn.Linear(2, 2))

    assert one == one
    assert one != summary(nn.Linear(2, 2))
    assert hash(one)


def test_of_a_model_without_parameters_no_empty_table_is_printed() -> None:
    assert str(summary(nn.ReLU())).splitlines()[0] == "ReLU: no parameters"
    assert "looks like" not in str(summary(nn.ReLU()))


def test_columns_that_do_not_fit_are_named_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "no room for zeros, mean, max, min, elements: .frame has them" in str(summary(nn.Linear(64, 64)))
    monkeypatch.setenv("COLUMNS", "200")
    assert "no room" not in str(summary(nn.Linear(20, 64)))
