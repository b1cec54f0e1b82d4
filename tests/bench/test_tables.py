"""README and docs/benchmarks.md: tables and figures are what bench/results says."""

import json
from pathlib import Path

from PIL import Image


def cuda_file(folder: Path, case: str, **shape: object) -> Path:
    """A result file as a run on a GPU leaves it."""
    rows = [
        {"case": f"{mode}", "entry": entry, "version": f"{entry} 1", "dtype": "bf16", "mode": mode, "head": "Toy-1B"}
        | {"h": 64, "v": 900, "error": {"logp": 1e-5}, "peak_mib": peak, "best_ms": ms - 0.5, "median_ms": ms, **shape}
        for mode in ("frozen", "trained")
        for entry, ms, peak in (("fastdpo", 2.0, 10.0), ("trl", 3.0, 40.0), ("liger", 4.0, 80.0))
        if (mode, entry) != ("trained", "liger")
    ]
    environment = {"device": "GPU X", "driver": "580", "cuda": "13.0", "torch": "2.13", "commit": "abc", "date": "D"}
    missing = [{"case": "trained", "entry": "liger", "reason": "out of memory"}]
    record = {
        "case": case,
        "rows": rows,
        "environment": {**environment, "command": "C"},
        "missing": missing,
        "complete": True,
    }
    path = folder / f"{case}_cuda_20990101.json"
    path.write_text(json.dumps(record))
    return path


def test_a_gpus_table_says_what_was_measured_and_what_was_not(bench, tmp_path):
    lines = bench.show.readme.cuda_table(cuda_file(tmp_path, "linear_logprob", n=4096)).splitlines()
    assert lines[2] == (
        "| Toy-1B (64 x 900) frozen | 2.00, 10, 1e-05 | 3.00 (1.50 x), 40, 1e-05 | 4.00 (2.00 x), 80, 1e-05 |"
    )
    assert lines[3] == "| Toy-1B (64 x 900) trained | 2.00, 10, 1e-05 | 3.00 (1.50 x), 40, 1e-05 | out of memory |"
    assert lines[5] == (
        "4096 scored tokens, bf16, medians; GPU X, driver 580, CUDA 13.0; torch 2.13; fastdpo 1, trl 1, liger 1; "
        "commit abc; D; `C`. Not everything was measured: linear_logprob_cuda_20990101.json says what."
    )


def test_pages_have_gpu_tables_only_where_there_are_results(bench, tmp_path, monkeypatch):
    tables = bench.show.readme
    readme = f"before\n\n{tables.START}\nold\n{tables.END}\n\nafter\n"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    empty = tables.rendered(readme)
    assert empty == f"before\n\n{tables.START}\n{tables.END}\n\nafter\n"
    cuda_file(tmp_path, "linear_logprob", n=4096)
    one = tables.rendered(readme)
    assert one.startswith(f"before\n\n{tables.START}\n{tables.END}\n\n{tables.CUDA_START}\n| head, mode |")
    assert one.endswith(f"{tables.END}\n\nafter\n")
    assert tables.rendered(one) == one
    other = cuda_file(tmp_path, "dpo_loss", pairs=4, length=1024)
    both = tables.rendered(one)
    assert both.count("| head, mode |") == 2
    assert "4 pairs of 1024 positions, bf16" in both
    assert tables.rendered(both) == both
    other.unlink()
    assert tables.rendered(both) == one
    assert tables.rendered(one, "README.md") == empty  # which shows other benchmarks
    next(iter(tmp_path.glob("*"))).unlink()
    assert tables.rendered(one) == empty


def test_a_cpu_run_renders_as_a_table(bench, tmp_path):
    bench.measured(tmp_path, "--rounds", "1", "--quick")
    (path,) = tmp_path.glob("*.json")
    table = bench.show.readme.table(path)
    assert table.count("\n| 40x16x700") == 6
    assert "these ratios are CPU ratios" in table


def test_points_of_a_plot_are_a_figure_and_no_rows_of_the_table(bench, tmp_path):
    bench.measured(tmp_path, "--rounds", "1", "--plot", "--memory_budget", "1", "--entries", "fastdpo,eager")
    (path,) = tmp_path.glob("*.json")
    table = bench.show.readme.table(path)
    assert table.count("\n| 40x16x700") == 6
    assert "x16x150" not in table
    figure = f"![linear_logprob: time and peak memory against N and V](bench/results/{path.stem}.png)"
    assert table.splitlines()[-1] == figure
    assert "needs at most 1 MiB above its inputs" in table
    fits = {(f["entry"], f["mode"]): f for f in json.loads(path.read_text())["largest"]}
    cells = [
        f"{fits[name, 'trained']['n']} ({fits[name, 'trained']['peak_mib']:.0f} MiB)" for name in ("fastdpo", "eager")
    ]
    assert f"| 16 x 300, bf16 trained | {' | '.join(cells)} |" in table


def test_pages_render_their_benchmarks_and_figures(bench, tmp_path, monkeypatch, capsys):
    tables = bench.show.readme
    readme, page, results = tmp_path / "README.md", tmp_path / "docs/benchmarks.md", tmp_path / "results"
    empty = f"before\n\n{tables.START}\nold\n{tables.END}\n\nafter\n"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.main() == 1
    assert "README and its results are in the checkout, not in the package" in capsys.readouterr().err
    readme.write_text(empty)
    assert tables.main() == 1
    page.parent.mkdir()
    page.write_text(empty)
    peers = {"linear_logprob": "eager", "dpo_loss": "eager", "train_step": "trl"}
    for case, peer in peers.items():
        bench.measured(results, "--rounds", "1", "--plot", "--entries", f"fastdpo,{peer}", case=case)
    for path in results.glob("*.png"):
        path.unlink()
    assert tables.main() == 0
    text, shown = page.read_text(), readme.read_text()
    assert tables.rendered(text) == text
    assert tables.rendered(shown, "README.md") == shown
    assert "\n| N x H x V, dtype, mode | fastdpo" in text
    assert "\n| pairs, T x H x V, dtype, mode | fastdpo" in text
    assert "\n| model, pairs of tokens, dtype, mode | fastdpo" in text
    assert [line.partition(",")[0] for line in shown.splitlines() if "dtype, mode" in line] == ["| model"]
    for path in results.glob("*.json"):
        assert f"(../bench/results/{path.stem}.png)" in text
        assert (f"(bench/results/{path.stem}.png)" in shown) is path.stem.startswith("train_step")
        record = json.loads(path.read_text())
        assert Image.open(path.with_suffix(".png")).info[bench.show.plot.DIGEST] == bench.show.plot.digest(record)


def test_the_figures_of_the_pages_are_drawn_from_their_results(bench):
    root, pages = bench.show.readme.ROOT, bench.show.readme.PAGES
    for page, path in ((page, path) for page, cases in pages.items() for path in bench.show.readme.shown(cases)):
        record = json.loads(path.read_text())
        figure = f"bench/results/{path.stem}.png)"
        assert (figure in (root / page).read_text()) is bench.show.plot.can_draw(record)
        if bench.show.plot.can_draw(record):
            image = Image.open(path.with_suffix(".png"))
            assert image.info[bench.show.plot.DIGEST] == bench.show.plot.digest(record), (
                "run `python -m bench.show.readme`"
            )
