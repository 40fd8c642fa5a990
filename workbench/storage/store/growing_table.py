"""Parquet tables that grow: a folder of files, the last of which is written anew, in one step, with each addition."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import FormatError
from workbench.storage import disk
from workbench.storage.store.extra import need

_ROWS = 1 << 14  # of a file, before the next one begins
_ADDITIONS = 64


class GrowingTable:
    """One table; pandas, polars and DuckDB read its folder.

    Args:
        columns: the type of each column, by pyarrow's names.
        numbered: a column of whole numbers that grow with what is added.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str], numbered: str) -> None:
        self._arrow, self._parquet = need("pyarrow", "a store"), need("pyarrow.parquet", "a store")
        self._folder, self._numbered = folder, numbered
        types = {name: getattr(self._arrow, kind)() for name, kind in columns.items() if kind != "category"}
        category = self._arrow.dictionary(self._arrow.int32(), self._arrow.string())
        self._schema = self._arrow.schema([(name, types.get(name, category)) for name in columns])
        whole = {name: "DELTA_BINARY_PACKED" for name, kind in columns.items() if kind == "int64"}  # less, and sooner
        self._form = {"column_encoding": whole, "use_dictionary": [name for name in columns if name not in types]}
        self._parts: list[Any] = []
        self._number = 0

    def open(self) -> int:
        """Go on with what is there.

        Returns:
            One more than the largest number in the column that grows; 0 where nothing is there.

        Raises:
            FileError: the folder cannot be made. FormatError: what is there is no such table.
        """
        try:
            disk.inside(self._folder.parents[1], *self._folder.parts[-2:])
        except OSError as error:
            raise disk.failed(self._folder, error) from error
        there = sorted(self._folder.glob("*.parquet"))
        if not there:
            return 0
        try:
            self._number = int(there[-1].stem)
            with open(there[-1], "rb", opener=disk.plain) as file:  # Arrow takes only names that are UTF-8
                held = self._parquet.read_table(file).cast(self._schema)
            last = int(max(held[self._numbered].to_pylist()))
        except (self._arrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            raise FormatError(
                f"the table {self._folder.name} is damaged: {type(error).__name__}: {error}",
                hint=f"remove the folder {self._folder.parent.name}: it is made anew of what else is in the store",
            ) from None
        self._parts = [held]
        return last + 1

    def add(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Add rows.

        Raises:
            FileError: they cannot be written.
        """
        arrays = [self._arrow.array(rows[field.name], type=field.type, from_pandas=False) for field in self._schema]
        added = self._arrow.Table.from_arrays(arrays, schema=self._schema)
        if not added.num_rows:
            return
        if self._parts and (sum(len(one) for one in self._parts) >= _ROWS or len(self._parts) >= _ADDITIONS):
            self._parts, self._number = [], self._number + 1
        self._parts.append(added)
        target = self._folder / f"{self._number:06d}.parquet"
        draft = self._folder / ".draft"
        try:
            whole = self._arrow.concat_tables(self._parts).unify_dictionaries().combine_chunks()
            with open(draft, "wb", opener=disk.plain) as file:
                self._parquet.write_table(whole, file, compression="zstd", compression_level=1, **self._form)
            os.replace(draft, target)
        except OSError as error:
            self._parts.pop()
            raise disk.failed(target, error) from error
