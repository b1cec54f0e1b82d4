"""The figure: one row of panels for time and one for memory in each mode, what its lines hold, where it says what."""

import io
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image


@pytest.fixture
def plot(bench):
    return bench.show.plot


def record(**changes) -> dict:
    """Two entries at three N and three V; time is N ms, peak is V MiB."""
    shapes = [(n, 300) for n in (10, 20, 40)] + [(20, v) for v in (150, 600)]
    rows = [
        {"case": f"{n}x16x{v} bf16 {mode}", "entry": entry, "version": f"{entry} 1", "mode": mode, "n": n, "tokens": n}
        | {"h": 16, "v": v, "dtype": "bf16", "softcap": None, "inputs": "peaked", "median_ms": factor * n}
        | {"p20_ms": factor * n * 0.9, "p80_ms": factor * n * 1.2, "peak_mib": factor * v, "sweep": True}
        for n, v in shapes
        for mode in ("frozen", "trained")
        for entry, factor in (("fastdpo", 1.0), ("eager", 2.0))
    ]
    environment = {"device": "CPU X", "threads": 2, "torch": "2.13", "commit": "abc", "date": "D", "command": "C"}
    return {"case": "linear_logprob", "environment": environment, "rows": rows, "missing": [], **changes}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    drawn = []
    init = FigureCanvasAgg.__init__

    def watched(self, figure, *rest):
        drawn.append(figure)
        init(self, figure, *rest)

    monkeypatch.setattr(FigureCanvasAgg, "__init__", watched)
    return drawn


def test_lines_are_the_measurements_on_log_axes(plot, figures):
    plot.draw(record())
    figure = figures[0]
    assert len(figure.axes) == 8
    time_n, time_v, _, memory_v = figure.axes[:4]
    for panel in figure.axes:
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert [line.get_label() for line in panel.get_lines()] == ["fastdpo", "eager"]
    assert (time_n.get_xlabel(), time_n.get_ylabel()) == ("scored tokens N", "median ms")
    assert (memory_v.get_xlabel(), memory_v.get_ylabel()) == ("vocabulary V", "peak MiB above inputs")
    points = [[list(axis) for axis in line.get_data()] for panel in (time_n, memory_v) for line in panel.get_lines()]
    assert points == [
        [[10, 20, 40], [10, 20, 40]],
        [[10, 20, 40], [20, 40, 80]],
        [[150, 300, 600], [150, 300, 600]],
        [[150, 300, 600], [300, 600, 1200]],
    ]
    assert [tick.get_text() for tick in time_v.get_xticklabels()] == ["150", "300", "600"]
    assert time_n.get_title() == "head frozen (LoRA); H = 16, V = 300, bf16"
    assert memory_v.get_title() == "head frozen (LoRA); N = 20, H = 16, bf16"
    assert figure.axes[4].get_title().startswith("head trained; ")


def test_legend_and_caption_say_whose_and_where(plot, figures):
    drawn = record(missing=[{"case": "x", "entry": "eager", "reason": "out of memory"}])
    drawn["rows"].append({**drawn["rows"][0], "entry": "trl", "version": "trl 1.16.0"})
    plot.draw(drawn)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "fastdpo (fastdpo 1)",
        "eager (eager 1)",
        "trl (trl 1.16.0)",
    ]
    assert legend.get_title().get_text().startswith("linear_logprob: time and peak memory")
    caption = " ".join(figures[0].get_supxlabel().split())
    assert "CPU X, 2 threads; torch 2.13; commit abc; D; `C`" in caption
    assert "the 20th to the 80th percentile" in caption
    assert "ran out of memory: eager" in caption
    assert "these ratios are CPU ratios" in caption


def test_a_size_that_was_measured_once_is_no_line(plot, figures):
    one_v = record()
    one_v["rows"] = [row for row in one_v["rows"] if row["v"] == 300]
    plot.draw(one_v)
    assert [len(panel.get_lines()) for panel in figures[0].axes[:4]] == [2, 0, 2, 0]
    assert "only one V was measured" in figures[0].axes[1].texts[0].get_text()
    one_v["rows"] = [row for row in one_v["rows"] if row["n"] == 20]
    assert not plot.can_draw(one_v)
    with pytest.raises(ValueError, match="run with --plot"):
        plot.draw(one_v)


def test_shapes_that_differ_in_another_size_are_no_line(plot):
    mixed = record()["rows"]
    other_head = [{**row, "h": 32, "v": 128000} for row in mixed if row["n"] == 10]
    points = plot.series([*mixed, *other_head], "frozen", "v")
    assert {row["h"] for row in points.rows} == {16}
    assert [row["v"] for row in points.rows if row["entry"] == "eager"] == [150, 300, 600]


def test_a_quick_run_draws_a_png_of_its_own_record(bench, plot, tmp_path, capsys):
    for case in ("linear_logprob", "dpo_loss"):
        status, measured = bench.measured(tmp_path, "--quick", "--plot", "--rounds", "1", case=case)
        assert status == 0
        (path,) = tmp_path.glob(f"{case}_cpu_*.png")
        assert f"written: {path}" in capsys.readouterr().out
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert image.format == "PNG"
        assert min(image.size) > 600
        assert image.info[plot.DIGEST] == plot.digest(measured)
        sweep = [row for row in measured["rows"] if row["sweep"]]
        assert len({row["tokens"] for row in sweep}) >= 3
        assert {row["v"] for row in sweep} == {150, 300, 600}
        # drawn again from the JSON alone
        path.unlink()
        assert plot.main([str(path.with_suffix(".json"))]) == 0
        assert Image.open(path).info[plot.DIGEST] == plot.digest(measured)


def test_only_a_quick_run_draws_unasked(bench):
    parse = bench.arguments.parse
    expected = {
        (): False,
        ("--plot",): True,
        ("--quick",): True,
        ("--quick", "--no-plot"): False,
        ("--quick", "--no_plot"): False,
    }
    for argv, plots in expected.items():
        assert bench.benchmark._wants_plot(parse(argv, "p")) is plots
    sweeps = [case for case in bench.linear_logprob.cases.sweep_cases("cpu", True) if case.mode == "frozen"]
    assert [(case.n, case.v) for case in sweeps] == [(10, 300), (20, 300), (40, 300), (20, 150), (20, 600)]


def test_a_result_without_points_is_refused_with_words(plot, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**record(), "rows": []}))
    with pytest.raises(SystemExit):
        plot.main([str(path)])
    assert "no shape was measured at two N or two V" in capsys.readouterr().err
