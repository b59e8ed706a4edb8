"""Columns of images in the data sets of LLaMA-Factory."""

import json

import pytest

from ftdata.importers import import_config


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_column_of_images_is_mapped(formatting, tmp_path):
    info = {"file_name": "x.json", "formatting": formatting, "columns": {"images": "photos"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"photos": info}))
    (tmp_path / "x.json").write_text("[]")
    imported = import_config(tmp_path / "dataset_info.json")
    assert imported.config.columns == {"images": "photos"}
    assert any("image_folder" in note for note in imported.notes)
