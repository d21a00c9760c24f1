"""The training of `01_shared_mlp.py` from the command line, with Lightning's own command line and YAML files.

    python examples/03_lightning_cli.py fit --config configs/shared_mlp.yaml
    python examples/03_lightning_cli.py fit --config configs/shared_mlp.yaml --config configs/cheap.yaml
    python examples/03_lightning_cli.py fit --config configs/shared_mlp.yaml --watch.every 5

The arguments of the callback stand under `watch`, so that a preset, or an option, sets them without repeating the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from shared_mlp_lightning import IrisData, LitSharedMLP

from paramwatch.lightning import ParamWatch


class ExerciseCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ParamWatch, "watch")

    def after_fit(self) -> None:
        print(f"The run was written to {self.trainer.log_dir}")


def main(args: Sequence[str] | None = None) -> None:
    ExerciseCLI(LitSharedMLP, IrisData, args=list(args) if args is not None else None)


if __name__ == "__main__":
    main()
