"""Numbers that grow on the disk: zarr arrays, parquet tables, and a journal that says which of them are whole."""
