"""What goes wrong with data: `DataError` for the user, `RowError` for the one row that has a reason."""


class DataError(ValueError):
    """Data that cannot be used. The message is complete and user-facing; it may list rows line by line."""


class RowError(ValueError):
    """Why one row cannot be used. Whoever reads the rows adds the place and collects them into a
    `DataError`."""


def refuse_twice(place: str, names: list[str]) -> None:
    twice = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if twice is not None:
        raise DataError(f"{place}: more than one column is named `{twice}`; rename or remove the others.")
