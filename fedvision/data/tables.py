"""A value for every case from a CSV file: its site, its patient or its split.

The row of a case is found by whichever column names cases: by id, by file name, or by path below the
source. The user names only the file and the column that holds the value.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fedvision.data.sources import Found, first_names
from fedvision.errors import ConfigError, DataError


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; the delimiter is a comma, a semicolon or a tab."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [
        {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)} for row in rows
    ]


def _table_path(text: str, source: Path) -> tuple[Path, str]:
    """Split ``FILE.csv:COLUMN``; a file that is not found from here is looked for in the source."""
    name, colon, column = text.rpartition(":")
    if not (name and colon and column):
        raise ConfigError(f"expected FILE.csv:COLUMN, got {text!r}")
    path = Path(name)
    if not path.is_file() and (source / name).is_file():
        path = source / name
    return path, column


def _keys(case: Found) -> tuple[str, ...]:
    """Return what a table may call a case, most telling first."""
    path = case.image[0]
    without_suffix = case.relative.removesuffix(path.name) + case.stem
    return (case.relative, without_suffix, str(path), path.name, case.stem)


def values_from_table(text: str, found: Sequence[Found], source: Path) -> list[str]:
    """Return the value of ``FILE.csv:COLUMN`` for every case.

    Args:
        text: File and column; a relative file is looked for from here and then in the source.
        found: The cases.
        source: The data set's folder.

    Returns:
        One value a case, in the order of ``found``.

    Raises:
        ConfigError: The text is not ``FILE.csv:COLUMN``.
        DataError: The file or the column is absent, no column names the cases, a case has no row or no
            value, or two rows give a case different values.
    """
    path, column = _table_path(text, source)
    rows = _read_rows(path)
    if not rows:
        raise DataError(f"{path}: no rows below the header")
    if column not in rows[0]:
        raise DataError(f"{path}: no column {column!r}", f"its columns are {', '.join(rows[0])}")
    # A name that two cases share says nothing about either.
    owners: dict[str, set[int]] = {}
    for number, case in enumerate(found):
        for key in _keys(case):
            owners.setdefault(key, set()).add(number)
    single = {key: numbers.pop() for key, numbers in owners.items() if len(numbers) == 1}

    def named(value: str) -> int | None:
        return single.get(value.removeprefix("./"))

    others = [name for name in rows[0] if name != column]
    matches = {name: sum(named(row.get(name, "")) is not None for row in rows) for name in others}
    key_column = max(matches, key=lambda name: matches[name], default=None)
    if key_column is None or matches[key_column] == 0:
        raise DataError(
            f"{path}: no column names the cases",
            f"one must hold ids or image files such as {found[0].stem} or {found[0].relative}",
        )
    values: dict[int, str] = {}
    for row in rows:
        owner, value = named(row.get(key_column, "")), row.get(column, "")
        if owner is None:
            continue
        if values.setdefault(owner, value) != value:
            raise DataError(
                f"{path}: case {row[key_column]} has both {values[owner]!r} and {value!r} as {column}"
            )
    absent = [case.stem for number, case in enumerate(found) if not values.get(number)]
    if absent:
        raise DataError(
            f"{path}: no {column} for {len(absent)} of {len(found)} cases ({first_names(absent)})",
            f"cases are looked up in column {key_column!r}",
        )
    return [values[number] for number in range(len(found))]
