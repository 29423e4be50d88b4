"""Write the JSON Schema of each format of a run's files and of bundles: python dev/schemas.py."""
from __future__ import annotations

import json
from pathlib import Path

from cvnb.core.output_formats import FORMATS, format_schema
from cvnb.export.bundle_format import BundleDescription

FOLDER = Path(__file__).resolve().parent.parent/"configs"/"schemas"


def schema_files() -> dict[Path, str]:
    "Generate the files: path -> text."
    return {FOLDER/f"{Path(name).stem}.schema.json": json.dumps(format_schema(name, model), indent=1) + "\n"
            for name, model in (FORMATS | {"bundle.json": BundleDescription}).items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in schema_files().items(): path.write_text(text, encoding="utf-8")
