"""Reader of the file of an offline W&B run."""
from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _records(
    data: bytes,       # an offline run's file
) -> Iterator[bytes]:  # serialized records
    "Read LevelDB's log format: blocks of 32 KiB with parts of records, after W&B's own seven bytes."
    position, record = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if room < 7 or not kind:   # the rest of the block is padding
            position += room
            continue
        record += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):   # a whole record, or the last part of one
            yield record
            record = b""


def _items(entries: Any) -> dict[str, Any]:
    "Decode key-value pairs."
    return {e.key or "/".join(e.nested_key): json.loads(e.value_json) for e in entries}


def read_wandb_file(
    folder: Path | str,   # an offline run's folder, such as train/wandb/offline-run-…
) -> dict[str, Any]:      # id, config, summary, history (a list of dicts), artifacts (name -> metadata), files
    "Read what an offline W&B run holds."
    from wandb.proto import wandb_internal_pb2 as pb
    found = dict(id="", config={}, summary={}, history=[], artifacts={}, files=[])
    path, = Path(folder).glob("*.wandb")
    for data in _records(path.read_bytes()):
        record = pb.Record.FromString(data)
        if record.HasField("run"):
            found["id"] = record.run.run_id
            found["config"] |= _items(record.run.config.update)
        elif record.HasField("config"): found["config"] |= _items(record.config.update)
        elif record.HasField("summary"): found["summary"] |= _items(record.summary.update)
        elif record.HasField("history"): found["history"].append(_items(record.history.item))
        elif record.HasField("artifact"):
            found["artifacts"][record.artifact.name] = json.loads(record.artifact.metadata or "{}")
        elif record.HasField("files"): found["files"] += [f.path for f in record.files.files]
    return found
