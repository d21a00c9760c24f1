"""`summary` of tensors that are not plain: sparse, sharded, negated, fake; small ones and those that are looked at in part."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import init
from truth import reals
from uses_on_ranks import SHARDS
from verdicts import holding

from paramwatch import summary
from paramwatch.sampling import EXACT

LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]

beta = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
"""torch warns once of its compressed layouts."""


def sparse(dense: Tensor, layout: torch.layout) -> Tensor:
    return dense.to_sparse(layout=layout, blocksize=(2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None)


@beta
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("n", [20, 80, 1100])
def test_a_sparse_tensor_is_measured_by_what_it_stores(n: int, layout: torch.layout) -> None:
    torch.manual_seed(0)
    dense = torch.randn(n, n, dtype=torch.float64) * (torch.rand(n, n) < 0.3)
    row = summary(holding(sparse(dense, layout))).frame.loc["p"]
    x = dense.numpy()

    assert re.match(r"(69|70|71|72) % zeros, else (normal\(0, 1\)|too few to tell)", row["looks_like"])
    assert row["exact"]
    expected = [x.mean(), x.std(), x.min(), x.max(), (x == 0).mean()]
    assert list(row[["mean", "std", "min", "max", "zero_frac"]]) == pytest.approx(expected, rel=1e-9)


@beta
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_identity_stored_sparsely_is_not_all_zeros(layout: torch.layout) -> None:
    row = summary(holding(sparse(torch.eye(1200), layout))).frame.loc["p"]

    assert row["looks_like"] == "99.9 % zeros, else 1"
    assert row["theoretical_std"] == pytest.approx(row["std"], rel=1e-9)


def test_of_a_sparse_tensor_that_stores_much_a_sample_is_looked_at() -> None:
    torch.manual_seed(0)
    dense = torch.randn(1500, 1500) * (torch.arange(1500) % 4 > 0)
    row = summary(holding(dense.to_sparse())).frame.loc["p"]

    assert row["looks_like"] == "25 % zeros, else normal(0, 1)"
    assert not row["exact"]
    assert (row["min"], row["max"], row["zero_frac"]) == (dense.min(), dense.max(), 0.25)
    assert row["std"] == pytest.approx(dense.std().item(), rel=0.05)


def test_a_sparse_tensor_is_not_laid_out_to_be_measured() -> None:
    # dense it would have eight terabytes
    huge = torch.sparse_coo_tensor(torch.stack([torch.arange(5000)] * 2), torch.full((5000,), 2.0), (10**6, 10**6), check_invariants=True)
    row = summary(holding(huge)).frame.loc["p"]

    assert row["looks_like"] == "99.9999995 % zeros, else 2"
    assert row["mean"] == pytest.approx(1e-8, rel=1e-9)


@pytest.mark.parametrize("n", [20, 1200])
def test_a_sparse_tensor_that_stores_nothing_is_zeros(n: int) -> None:
    row = summary(holding(torch.zeros(n, n).to_sparse())).frame.loc["p"]

    assert (row["looks_like"], row["mean"], row["std"], row["zero_frac"]) == ("zeros", 0, 0, 1)


@pytest.mark.parametrize("n", [20, 1200])
def test_what_is_not_finite_in_a_sparse_tensor_is_found(n: int) -> None:
    broken = torch.eye(n)
    broken[3, 3] = float("nan")

    assert summary(holding(broken.to_sparse())).warnings["p"].startswith("NaN or infinite elements (1)")


def test_large_complex_and_mkldnn_tensors_are_read() -> None:
    torch.manual_seed(0)
    drawn = torch.randn(1100, 1100, dtype=torch.complex64)
    assert summary(holding(drawn)).frame["looks_like"]["p"] == "normal(0, 0.7)"
    assert summary(holding(drawn.to_sparse())).frame["looks_like"]["p"] == "normal(0, 0.7)"
    if torch.backends.mkldnn.is_available():
        assert summary(holding(torch.randn(1100, 1100).to_mkldnn())).frame["looks_like"]["p"] == "normal(0, 1)"


@pytest.mark.parametrize("n", [20, 1100])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_negated_view_is_read_as_what_it_says(dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(0)
    view = torch.randn(n, n, dtype=dtype).conj().imag
    assert view.is_neg()
    seen, told = (summary(holding(tensor)).frame.loc["p"] for tensor in (view, view.resolve_neg()))

    assert seen.equals(told)
    assert (seen["min"], seen["max"]) == (reals(view).min(), reals(view).max())


# looking for ties asks for their address
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_a_fake_tensor_has_no_values() -> None:
    with FakeTensorMode():
        net = nn.Linear(3, 3)
        net(torch.ones(2, 3)).sum().backward()
    found = summary(net)

    assert set(found.frame["looks_like"]) == {"fake: no values"}
    assert set(found.frame["gradient"]) == {"set"}
    assert "fake: no values" in str(found)


class Scaled(Tensor):
    """Integers and a factor, as quantised weights are held; it can be dequantised, and nothing else."""

    @staticmethod
    def __new__(cls, integers: Tensor, factor: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=factor.dtype)

    def __init__(self, integers: Tensor, factor: Tensor) -> None:
        self.integers, self.factor = integers, factor

    def dequantize(self) -> Tensor:
        return self.integers * self.factor

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].integers, args[0].factor)
        raise NotImplementedError(func)


@pytest.mark.parametrize("n", [40, 80, 1100])
def test_a_tensor_that_can_only_be_dequantised_is_read_so(n: int) -> None:
    torch.manual_seed(0)
    drawn = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    row = summary(holding(Scaled(drawn, torch.rand(n, 1) + 0.5))).frame.loc["p"]

    assert row["exact"] == (n < 1100)
    orthogonal = Scaled(init.orthogonal_(torch.empty(n, n)), torch.ones(1))
    assert summary(holding(orthogonal)).frame["looks_like"]["p"] == "orthogonal"
    sparse = Scaled(init.sparse_(torch.empty(n, n), 0.25), torch.ones(1))
    assert summary(holding(sparse)).frame["looks_like"]["p"].startswith("25 % zeros in each column, else normal(0, 0.01)")


# ---- sharded --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """Of this process alone."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def part(local: Tensor, shape: tuple[int, int], mesh: object) -> nn.Module:
    """Of a sharded tensor of some shape this process holds that."""
    from torch.distributed.tensor import DTensor, Shard

    stride = (shape[1], 1)
    return holding(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride))


@pytest.mark.parametrize("n", [64, EXACT // 1024 + 76])
def test_sharded_layers_are_recognised_as_if_they_were_not(n: int, mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))
    init.orthogonal_(net[1].weight)
    plain = summary(net).frame
    fully_shard(net, mesh=mesh)
    frame = summary(net).frame

    assert list(frame["looks_like"]) == list(plain["looks_like"])
    assert list(frame["family"]) == ["uniform", "orthogonal"]
    assert frame.drop(columns=["module_type", "aliases"]).equals(plain.drop(columns=["module_type", "aliases"]))


@pytest.mark.skipif(not SHARDS, reason="this torch shards on no CPU")
def test_the_gradient_of_a_sharded_layer_is_that_of_its_shard(mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    net = nn.Linear(4, 4)
    fully_shard(net, mesh=mesh)
    net(torch.ones(2, 4)).sum().backward()
    net.bias.grad = net.bias.grad * 0

    assert list(summary(net).frame["gradient"]) == ["set", "zero"]


@pytest.mark.parametrize(("shape", "held"), [((64, 64), 20), ((64, 80), 20), ((1100, 1100), 1000), ((1100, 1100), 1)], ids=str)
def test_a_shard_of_orthogonal_rows_is_orthogonal_and_says_that_it_is_one(shape: tuple[int, int], held: int, mesh: object) -> None:
    torch.manual_seed(0)
    row = summary(part(init.orthogonal_(torch.empty(shape))[:held].clone(), shape, mesh)).frame.loc["p"]

    assert row["looks_like"].startswith("local shard: orthogonal")
    assert row["shape"] == shape
    assert row["theoretical_std"] == pytest.approx(shape[1] ** -0.5, rel=1e-5)


def test_a_shard_without_whole_columns_is_judged_by_its_elements_and_the_fans_of_the_whole(mesh: object) -> None:
    torch.manual_seed(0)
    found = [fill(torch.empty(300, 200))[:100].clone() for fill in (init.orthogonal_, init.xavier_normal_, init.eye_)]
    texts = [summary(part(local, (300, 200), mesh)).frame["looks_like"]["p"] for local in found]

    assert texts[0].startswith("local shard: ")
    assert texts[1].startswith("local shard: Xavier normal")
    assert texts[2] == "local shard: 99.5 % zeros, else 1"


def test_a_process_without_a_shard_says_so(mesh: object) -> None:
    row = summary(part(torch.empty(0, 8), (1, 8), mesh)).frame.loc["p"]

    assert (row["looks_like"], row["family"]) == ("sharded: no values in this process", "unknown")
