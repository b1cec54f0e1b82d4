"""What goes wrong with data: `DataError` for the user, `RowError` for the one row that has a reason."""


class DataError(ValueError):
    """Data that cannot be used. The message is complete and user-facing; it may list rows line by line."""


class RowError(ValueError):
    """Why one row cannot be used. Whoever reads the rows adds the place and collects them into a
    `DataError`."""
