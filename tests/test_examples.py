"""The examples and configurations, run as a reader runs them: each in its own process, from another folder, for two epochs."""

from __future__ import annotations

import csv
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import paramwatch
from paramwatch.tensorboard.address import first_view

ROOT = Path(__file__).parents[1]
EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "configs"
PRESETS = ("cheap", "default", "full")
STEPS_OF_TWO_EPOCHS = 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def exercise(runs: Path) -> str:
    return run_example(runs, "01_shared_mlp.py", "--epochs=2", f"--log-dir={runs}")


@pytest.fixture(scope="module")
def plain_loop(runs: Path) -> str:
    return run_example(runs, "02_plain_loop.py", "--epochs=2", f"--log-dir={runs}")


@pytest.fixture(scope="module")
def presets(runs: Path) -> dict[str, paramwatch.Run]:
    """One run of the command line for each preset, all in one process: Lightning takes longer to import than to train."""
    code = f"import runpy, sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
    for preset in PRESETS:
        configs = [f"--config={CONFIGS / name}.yaml" for name in ("shared_mlp", preset)]
        changes = ["--trainer.max_epochs=2", f"--trainer.logger.init_args.save_dir={runs}"]
        code += f"sys.argv[1:] = {['fit', *configs, *changes]}\n"
        code += f"runpy.run_path({str(EXAMPLES / '03_lightning_cli.py')!r}, run_name='__main__')\n"
    written = re.findall(r"The run was written to (.+)", output_of(runs, "-c", code))
    return dict(zip(PRESETS, map(paramwatch.load, written), strict=True))


def run_example(cwd: Path, script: str, *args: str) -> str:
    return output_of(cwd, str(EXAMPLES / script), *args)


def output_of(cwd: Path, *args: str) -> str:
    """What Python prints; both its streams must be free of warnings."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, encoding="utf-8", timeout=240, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert not re.search("Warning|deprecated", done.stdout + done.stderr), done.stdout + done.stderr
    return done.stdout


def test_exercise_shows_eight_names_of_six_tensors(exercise: str) -> None:
    assert "8 names, 6 tensors" in exercise
    assert re.search(r"^2\.weight +4\.weight +\(8, 8\) +64 +256$", exercise, re.MULTILINE)
    assert re.search(r"^2\.bias +4\.bias +\(8,\) +8 +32$", exercise, re.MULTILINE)
    assert "sharing saves 288 bytes" in exercise


def test_exercise_shows_that_there_is_no_gradient_before_the_first_backward(exercise: str) -> None:
    assert re.search(r"net\[6\]\.bias +Parameter containing: tensor\(\[.+\], requires_grad=True\)", exercise)
    assert re.search(r"net\[6\]\.bias\.grad is None +True", exercise)
    assert re.search(r"all gradients are None +True", exercise)


def test_exercise_shows_layers_2_and_4_in_each_line_with_equal_norms(exercise: str) -> None:
    assert re.search(r"^layer +0 +2 +4 +6 +0 +2 +4 +6 *$", exercise, re.MULTILINE)

    lines = re.findall(r"^(\d+)((?: +\d+\.\d{4}){8})$", exercise, re.MULTILINE)

    assert [int(step) for step, _ in lines] == [0, 1, 10, 29]
    for _, line in lines:
        _, param_2, param_4, _, _, grad_2, grad_4, _ = line.split()
        assert (param_2, grad_2) == (param_4, grad_4)


def test_exercise_shows_whether_the_two_uses_agree_during_training(exercise: str) -> None:
    assert re.search(r"^ +\|layer 2\| +\|layer 4\| +share of 2 +share of 4 +agreement$", exercise, re.MULTILINE)
    lines = re.findall(r"^(\d+)((?: +-?\d\.\d{4}){5})$", exercise.partition("do layers 2 and 4 agree?")[2], re.MULTILINE)

    assert [int(step) for step, _ in lines] == [0, 10, 20]
    for _, line in lines:
        first, second, share_2, share_4, agreement = map(float, line.split())
        total = first**2 + second**2 + 2 * agreement * first * second
        assert share_2 + share_4 == pytest.approx(1, abs=2e-4)
        assert share_2 * total == pytest.approx(first**2 + agreement * first * second, rel=0.05, abs=1e-5)


def test_exercise_proves_that_the_gradients_of_the_uses_add_up(exercise: str) -> None:
    differences = re.findall(r"^relative difference (?:before|after) training: (\S+)$", exercise, re.MULTILINE)

    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences)


def test_exercise_has_a_progress_bar_and_ends_with_the_line_to_type(exercise: str, runs: Path) -> None:
    assert "Epoch 1: 100%" in exercise
    assert re.search(r"On all 150 irises: loss \d\.\d+, accuracy \d+\.\d%\.", exercise)
    command, address = exercise.rstrip().splitlines()[-2:]
    assert command.endswith(f"tensorboard --logdir {runs}")
    assert address.strip() == first_view()


def test_exercise_fits_a_terminal_of_100_columns(exercise: str, runs: Path) -> None:
    prose = [line for line in exercise.split("The parameters:")[1].splitlines() if str(runs) not in line]
    assert max(map(len, prose)) <= 100


@pytest.mark.usefixtures("exercise", "plain_loop")
def test_lightning_and_the_plain_loop_give_the_same_numbers(runs: Path) -> None:
    lightning, plain = load_both(runs)

    pd.testing.assert_frame_equal(lightning, plain, check_exact=True)


@pytest.mark.usefixtures("exercise")
def test_the_command_line_gives_the_same_numbers_as_the_exercise(runs: Path, presets: dict[str, paramwatch.Run]) -> None:
    exercise = paramwatch.load(runs / "shared_mlp" / "version_0").frame()

    pd.testing.assert_frame_equal(presets["default"].frame(), exercise, check_exact=True)


def test_plain_loop_ends_with_the_numbers_of_the_exercise(exercise: str, plain_loop: str) -> None:
    learned = re.compile("On all 150 irises: .+")
    assert learned.search(plain_loop)[0] == learned.search(exercise)[0]


def test_presets_differ_in_what_they_record(presets: dict[str, paramwatch.Run]) -> None:
    steps = {preset: len(run.steps) for preset, run in presets.items()}
    columns = {preset: set(run.frame().columns) for preset, run in presets.items()}

    assert steps == {"cheap": STEPS_OF_TWO_EPOCHS // 10, "default": STEPS_OF_TWO_EPOCHS, "full": STEPS_OF_TWO_EPOCHS}
    assert columns["cheap"] < columns["default"] < columns["full"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_arguments_of_the_callback_and_nothing_else(preset: str) -> None:
    from paramwatch.lightning import ParamWatch

    config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())

    assert list(config) == ["watch"]
    assert set(config["watch"]) <= set(inspect.signature(ParamWatch).parameters)


def test_the_default_preset_spells_out_the_defaults() -> None:
    from paramwatch.lightning import ParamWatch

    config = yaml.safe_load((CONFIGS / "default.yaml").read_text())["watch"]

    defaults = inspect.signature(ParamWatch).parameters
    assert config == {argument: defaults[argument].default for argument in config}


def test_iris_data_are_those_of_fishers_paper() -> None:
    with open(EXAMPLES / "data" / "iris.csv", newline="") as file:
        flowers = list(csv.reader(file))[1:]

    assert [sum(flower[4] == species for flower in flowers) for species in ("setosa", "versicolor", "virginica")] == [50, 50, 50]
    assert flowers[34] == ["4.9", "3.1", "1.5", "0.2", "setosa"]
    assert flowers[37] == ["4.9", "3.6", "1.4", "0.1", "setosa"]


def load_both(runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames of the exercise and of the plain loop, without the two columns that only Lightning fills."""
    before_clipping = ["grad_raw_norm", "clip_coef"]
    lightning, plain = (paramwatch.load(runs / run).frame() for run in ("shared_mlp/version_0", "plain_loop"))
    assert list(lightning.columns) == list(plain.columns)
    assert plain[before_clipping].isna().all(axis=None)
    assert len(plain) == STEPS_OF_TWO_EPOCHS * 6
    return lightning.drop(columns=before_clipping), plain.drop(columns=before_clipping)
