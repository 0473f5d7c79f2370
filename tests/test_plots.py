"""Claims about plots: a run's files become legible PNGs, of what there is and of nothing else."""

import signal
import sys

import pytest

from hf_automagic.reporting.plots import PALETTES, draw_plots
from hf_automagic.reporting.stats import RunRecord
from tests.processes import run_python

matplotlib = pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

CONFIG = {
    "optimizer": "automagic_8bit",
    "groups": [
        {
            "role": role,
            "is_full_weight": full,
            "self_tuning": True,
            "lr_search": True,
            "min_lr": low,
            "max_lr": high,
            "elements": 64,
        }
        for role, full, low, high in (("lora_A", False, 1e-7, 1e-3), ("full", True, 1e-8, 1e-4))
    ],
    "memory": {
        "total_bytes": 2_000_000,
        "adam_bytes": 8_000_000,
        "bytes_by_state": {"exp_avg_codes": 1_000_000, "exp_avg_scale": 900_000, "shared": 100_000},
    },
}
RATES = {"optim/lr_A": 1e-4, "optim/lr_full": 1e-5, "learning_rate": 5e-5}
EVENT = {"step": 20, "code": "EDGE_CASE"}


def rows(**values: float) -> list[dict[str, float]]:
    return [{"step": step, **RATES, **{f"optim/{k}": v for k, v in values.items()}} for step in (10, 20, 30)]


CASES = {
    "nothing": (RunRecord({}, [], []), []),
    "another optimizer": (RunRecord({}, [{"step": 1, "optim/lr_mean": 1e-4}], []), ["learning_rates"]),
    "one log": (RunRecord(CONFIG, rows()[:1], []), ["learning_rates", "memory"]),
    "a calm run": (RunRecord(CONFIG, rows(multiplier=1.0), []), ["learning_rates", "memory"]),
    "a moved multiplier": (RunRecord(CONFIG, rows(multiplier=0.8), []), ["learning_rates", "memory", "events"]),
    "an event without context": (RunRecord(CONFIG, rows(), [EVENT]), ["learning_rates", "memory", "events"]),
    "pairs": (RunRecord(CONFIG, rows(effective_rank=3.5), []), ["learning_rates", "memory", "effective_rank"]),
    "a rate of zero": (RunRecord(CONFIG, [{"step": 1, **RATES, "optim/lr_A": 0.0}], []), ["learning_rates", "memory"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_there_is_gets_drawn(case, tmp_path):
    record, expected = CASES[case]
    assert [path.stem for path in draw_plots(record, tmp_path)] == expected
    assert {path.stem for path in tmp_path.iterdir()} == {
        f"{name}{theme}" for name in expected for theme in ("", "_dark")
    }


def test_plots_are_wide_enough_small_enough_and_on_their_own_paper(tmp_path):
    record = RunRecord(CONFIG, rows(multiplier=0.8, effective_rank=3.5), [EVENT])
    for path in draw_plots(record, tmp_path):
        for theme, file in (("light", path), ("dark", path.with_stem(f"{path.stem}_dark"))):
            with image.open(file) as picture:
                assert picture.width >= 600
                assert picture.convert("RGBA").getpixel((1, 1)) == (*rgb(PALETTES[theme].paper), 255)
            assert file.stat().st_size <= 200_000


def test_a_schedule_that_ends_at_zero_does_not_squeeze_the_rates(monkeypatch, tmp_path):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    drawn: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.extend(figure.axes))
    ends = [{"step": 40, "optim/lr_A": 1e-13, "optim/lr_full": 1e-14, "learning_rate": 1e-15}]
    draw_plots(RunRecord(CONFIG, rows() + ends, []), tmp_path)
    lower, upper = drawn[0].get_ylim()
    assert 0.5e-8 <= lower <= 1e-8
    assert upper >= 1e-3


@pytest.mark.parametrize("theme", PALETTES)
def test_every_colour_stands_out_from_its_paper(theme):
    palette = PALETTES[theme]
    for colour in (palette.ink, palette.faint, palette.alarm, *palette.hues):
        assert contrast(colour, palette.paper) >= 3.0, colour  # WCAG 2.1, 1.4.11, for graphics
    assert contrast(palette.ink, palette.paper) >= 7.0


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb(colour))
    ]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


KILLED = """
import os, signal
from pathlib import Path
from matplotlib.figure import Figure
from hf_automagic.reporting.plots import draw_plots
from tests.test_plots import CASES
draw = Figure.savefig

def half(figure, target, **options):
    draw(figure, target, **options)
    with open(target, "r+b") if isinstance(target, (str, Path)) else target as file:
        file.truncate(1000)
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

Figure.savefig = half
draw_plots(CASES["pairs"][0], sys.argv[1])
"""


def test_killed_in_the_middle_of_a_plot_the_old_one_is_whole(tmp_path):
    record, names = CASES["pairs"]
    draw_plots(record, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    killed = run_python(f"import sys\n{KILLED}", tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / f"_{names[0]}.png.part").stat().st_size == 1000
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    draw_plots(record, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    record, names = CASES["pairs"]
    draw_plots(record, tmp_path)
    before = (tmp_path / f"{names[0]}.png").read_bytes()

    def fail(figure, target, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        draw_plots(record, tmp_path)
    assert (tmp_path / f"{names[0]}.png").read_bytes() == before


def test_the_users_own_style_stays(tmp_path):
    before = matplotlib.rcParams.copy()
    draw_plots(CASES["pairs"][0], tmp_path)
    assert matplotlib.rcParams == before


def test_a_missing_matplotlib_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf_automagic\[plot\]"):
        draw_plots(CASES["pairs"][0], tmp_path)
