"""Page headers of Parquet files: sizes are read as pyarrow reads them, and damaged headers are refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftdata.readers.parquet_pages import _CompactReader, read_pages


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli"])
def test_pages_contain_all_values_and_bytes_of_a_column_chunk(tmp_path, version, codec):
    values = [f"text {number % 700} " * 9 for number in range(20_000)]
    table = pa.table({"text": values, "number": np.arange(20_000)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression=codec, data_page_version=version, data_page_size=10_000)
    with path.open("rb") as stream:
        for index in range(2):
            column = pq.ParquetFile(path).metadata.row_group(0).column(index)
            pages = list(read_pages(stream, column))
            assert sum(page.values for page in pages if not page.is_dictionary) == 20_000
            assert sum(page.size for page in pages) <= column.total_uncompressed_size
            assert any(page.is_dictionary for page in pages) == column.has_dictionary_page


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"\x15\x00\x15\x02\x06\x04\x02\x00", "repeats a field"),
        (b"\x19" * 5000, "nested too deeply"),
        (b"\x1c" * 5000, "nested too deeply"),
        (b"\x15\xff\xff\xff\xff\xff\x0f\x00", "more than 32 bits"),
        (b"\x1f\x00", "unknown type"),
    ],
)
def test_headers_that_pyarrow_could_read_differently_are_refused(header, problem):
    with pytest.raises(ValueError, match=problem):
        _CompactReader(header).struct()
