"""Links in an output folder: what is written never lands in the place that a link leads to."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from fastdpo.files import METRICS_FOLDER, DiskError, check_output_dir, remove_tree, write_atomic


class LinkBeforeSaving(TrainerCallback):
    def __init__(self, link: Path, target: Path) -> None:
        self.link, self.target = link, target

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.link.symlink_to(self.target)


def test_metric_files_stay_in_the_output_folder(tmp_path: Path, make_trainer: Any) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / METRICS_FOLDER).symlink_to(elsewhere)
    with pytest.raises(DiskError, match=r"^output_dir .*out: its dpo_metrics is a link to .*elsewhere, out of that"):
        make_trainer(out)
    assert not list(elsewhere.iterdir())
    # one that leads nowhere yet would be made there
    elsewhere.rmdir()
    with pytest.raises(DiskError, match="is a link to"):
        check_output_dir(out, "output_dir")


def test_a_link_that_stays_inside_and_a_linked_output_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk" / "kept").mkdir(parents=True)
    (tmp_path / "disk" / METRICS_FOLDER).symlink_to("kept")
    (tmp_path / "out").symlink_to("disk")
    check_output_dir(tmp_path / "out", "output_dir")


def test_a_run_through_links_leaves_alone_what_they_lead_to(tmp_path: Path, make_trainer: Any) -> None:
    """The output folder is a link; checkpoint, staging folder and files in it are links to somebody else's."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    (tmp_path / "disk" / METRICS_FOLDER).mkdir(parents=True)
    out.symlink_to("disk")
    precious.mkdir()
    (precious / "text").write_text("precious")
    for name in ("_incomplete-checkpoint-1", "checkpoint-1"):
        (out / name).symlink_to(precious)
    for name in ("config.json", "training_args.bin", "model.safetensors", "dpo_metrics/summary.json"):
        (out / name).symlink_to(precious / "text")
    (out / "own.json").symlink_to(precious / "text")
    make_trainer(out, max_steps=2, save_steps=1, save_total_limit=1).train()
    assert [path.name for path in precious.iterdir()] == ["text"]
    assert (precious / "text").read_text() == "precious"
    assert sorted(path.name for path in out.iterdir() if path.is_symlink()) == ["own.json"]
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-2"]
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_a_staging_folder_that_becomes_a_link_is_not_written_through(tmp_path: Path, make_trainer: Any) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=1, save_steps=1)
    precious = tmp_path / "precious"
    precious.mkdir()
    trainer.add_callback(LinkBeforeSaving(tmp_path / "out" / "_incomplete-checkpoint-1", precious))
    trainer.train()
    assert not list(precious.iterdir())
    assert (tmp_path / "out" / "checkpoint-1" / "config.json").is_file()


def test_a_file_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "folder").symlink_to(tmp_path)
    remove_tree(tmp_path / "folder")
    assert (tmp_path / "precious").is_file()
