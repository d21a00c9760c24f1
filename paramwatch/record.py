"""What flows through the pipe once a step is measured: inventory, record, finding, and the two plug points.

Frozen values without torch types, so that everything downstream (store, TensorBoard, frames) can run where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from paramwatch.columns import PARTS, Array, Pair, kinds_of

GRAD_STATES = ("used", "zero", "none", "frozen", "unowned")
"""What became of a row's gradient in a step; a record holds the position in this tuple (`columns.ABSENT`: the row did not step)."""


@dataclass(frozen=True)
class Row:
    """One distinct parameter tensor of a model."""

    name: str
    """The first name `named_parameters(remove_duplicate=False)` gives, without wrapper prefixes."""
    aliases: tuple[str, ...]
    """The other names of the same tensor, in model order."""
    real_name: str
    """The name with wrapper prefixes kept."""
    module: str
    """Path of the module that holds it, "" for the model itself."""
    module_type: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    numel: int
    bytes: int
    trainable: bool
    owned: bool
    """True once an optimizer that holds it has stepped."""
    tie_group: int | None
    """Position in `Inventory.ties`, None for a tensor of its own."""
    from_step: int
    """The first step at which the row was there in this form."""


@dataclass(frozen=True)
class TieGroup:
    """Names that share one tensor, or parameters that share one piece of memory."""

    names: tuple[str, ...]
    kind: Literal["parameter", "storage"]
    """`parameter`: one tensor under several names, gradients are summed. `storage`: separate parameters on overlapping memory."""
    numel: int
    """Elements of the shared tensor (of the memory they span together, for `storage`)."""
    bytes_saved: int
    """Memory that separate tensors would take on top."""

    def __str__(self) -> str:
        names = " = ".join(self.names)
        if self.kind == "parameter":
            return f"{names}: one tensor of {self.numel:,} elements, {self.bytes_saved:,} bytes saved"
        return (
            f"{names}: separate parameters on one piece of memory. This is not tying: their gradients are not summed, "
            "and an optimizer that holds them updates that memory once for each. Assign the same nn.Parameter to all of them instead."
        )


@dataclass(frozen=True)
class Inventory:
    """What is recorded: the rows, the names that lead to them, and which parts of which kinds are kept."""

    rows: tuple[Row, ...]
    names: tuple[tuple[str, int], ...]
    """Every name, aliases included, in model order, with the position of its row."""
    ties: tuple[TieGroup, ...]
    layout: tuple[Pair, ...]
    model: str
    """Class name of the watched module, or of what it wraps."""

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds recorded: the first axis of `Record.values`."""
        return kinds_of(self.layout)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Where the row of each canonical name is in `rows`."""
        return {row.name: i for i, row in enumerate(self.rows)}

    @cached_property
    def awaited(self) -> frozenset[str]:
        """The rows without which a round is not whole: those that are trainable, and those that an optimizer holds."""
        return frozenset(row.name for row in self.rows if row.trainable or row.owned)

    @cached_property
    def bytes_a_round(self) -> int:
        """About what the readings of a round take."""
        return 8 * len(PARTS) * len(self.kinds) * len(self.rows)


@dataclass(frozen=True)
class CameApart:
    """Names that were one row when the model was read before, and are separate tensors now."""

    names: tuple[str, ...]
    """One name of each of the tensors, in model order."""
    step: int
    """The first step that found them so."""


@dataclass(frozen=True)
class Lost:
    """Tensors of an optimizer that were rows and are no longer in the model."""

    optimizer: str
    """Its class."""
    names: tuple[str, ...]
    """What the rows were called."""
    step: int
    """The step that it made with them or, where it holds nothing else of the model, would have made."""


@dataclass(frozen=True)
class Changes:
    """What happened to a model other than by the steps of its optimizers, as far as it was seen since the record before."""

    apart: tuple[CameApart, ...] = ()
    lost: tuple[Lost, ...] = ()
    outside: Mapping[str, int] = field(default_factory=dict)
    """Rows that a step found with other elements than their step before had left, each with the number of that one."""


UNCHANGED = Changes()
"""Nothing happened, as in nearly all steps."""


@dataclass(frozen=True)
class Split:
    """The gradient of one row in one step, split by use: K uses, with g_i the contribution of use i, summed over `backwards`."""

    uses: tuple[str, ...]
    """The places in the forward pass, in its order: `2`, `lm_head`, `cell@7`."""
    mode: str
    """What was kept while the uses arrived: `full` (all of them), `stream` (their sum; no shares, no cosines) or `norms` (nothing but a
    sample of the sum); then, after commas, what was left out of the step or done to the gradient, and `(this rank)` in a distributed run.
    `none`: no use was seen. `off`: something stood in the way, which the log named."""
    backwards: int
    """How many backward passes the contributions are summed over."""
    products: Array
    """float64 [K + 2, K + 2]: inner products of g_1 ... g_K, of the gradient G that autograd delivered, and of G minus the sum of the g_i.
    As they were summed: scaled by AMP, before ranks are averaged, before clipping. NaN where not computed."""
    rounding: float
    """Up to this, the norm of G minus the sum of the g_i is rounding."""
    unit: float
    """What a norm is multiplied with to be in units of the gradient as the optimizer used it: `grad_norm` over the norm of G."""


@dataclass(frozen=True)
class Record:
    """All rows x all parts of one step (of one part of a step, where it was read before its round was over)."""

    step: int
    time: float
    """Seconds since the epoch when the first optimizer in it was entered; where none is in it, when it was made."""
    inventory: Inventory
    steps: Mapping[str, Any]
    """What is known of the step as a whole: skipped, amp_scale, evaluations, backwards, update_mode, overhead_us, ..."""
    values: Mapping[str, Array]
    """Part -> [kinds, rows]; `count` is -1 where nothing was measured, and the other parts mean nothing there."""
    stepped: Array
    """bool [rows]: the rows an optimizer stepped."""
    lr: Array
    """float64 [rows]: the learning rate each row was stepped with, NaN where it was not."""
    grad_state: Array
    """int8 [rows]: position in `GRAD_STATES`, `ABSENT` for an owned row that did not step."""
    histograms: Mapping[str, Array] = field(default_factory=dict)
    """Kind ("param", "grad", "update") -> int64 [rows, bins]: how many elements are in each of the bins of `bins`, `ABSENT` throughout a
    row of which none was made. A kind of which no row has one is left out, and nearly all steps have none at all."""
    uses: Mapping[str, Split] = field(default_factory=dict)
    """Row name -> its gradient by use, in a step that was split; for statistics see `paramwatch.agreement`."""
    changes: Changes = field(default_factory=Changes)
    """For the rules; what they say of it is kept, this is not."""

    def __post_init__(self) -> None:
        split = [split.products for split in self.uses.values()]
        for array in (*self.values.values(), self.stepped, self.lr, self.grad_state, *self.histograms.values(), *split):
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"Record(step={self.step}, {len(self.inventory.rows)} rows x {len(self.inventory.layout)} parts)"


@dataclass(frozen=True)
class Finding:
    """Something a rule has to say about a step."""

    step: int
    rule: str
    parameter: str
    """Name of the row it is about, "" for the whole step."""
    message: str


@runtime_checkable
class Sink(Protocol):
    """A place to send records to. Called on a background thread, one call at a time, in step order.

    One that does not return is passed over when it holds the others up: it then lacks the records that were made meanwhile.
    """

    def write(self, record: Record) -> None:
        """Take one record. An exception switches the sink off, with a message that names it."""

    def close(self) -> None:
        """Called once, after the last record."""


Rule: TypeAlias = Callable[[Record], Iterable[Finding]]
"""Reads each record and says what it found."""
