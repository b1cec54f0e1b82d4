"""The mark of a dataset whose rows are pairs already: it is not normalized a second time.

The mark is the dataset's fingerprint, kept beside it. `datasets` gives each result of an operation a fingerprint of its
own, and a dataset that is formatted in place too, so the mark holds for exactly these rows: whatever a caller makes of
them is looked at again. Copies keep the mark. One that is saved and loaded has none.
"""

from datasets import Dataset

_MARK = "_fastdpo_normalized"


def mark_normalized(dataset: Dataset, *origins: Dataset) -> Dataset:
    """The dataset itself, marked. origins: those that its rows are taken from; all must be marked for it to be."""
    if all(is_normalized(origin) for origin in origins):
        setattr(dataset, _MARK, dataset._fingerprint)
    return dataset


def is_normalized(dataset: object) -> bool:
    """Whether its rows are as `load_preferences` or `normalize_dataset` made them."""
    return isinstance(dataset, Dataset) and getattr(dataset, _MARK, None) == dataset._fingerprint
