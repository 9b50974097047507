"""What a cache holds and costs: bytes an image, how close the stored features are, after how many epochs it pays."""

from __future__ import annotations

import json
from typing import Any

from safetensors import safe_open

from dune_fast.cache.store import Store, shard_path


def summarize(store: Store) -> dict[str, Any]:
    """Numbers of a complete cache; cosines are means over tokens of the stored features with those of the teachers."""
    present, seconds, cosines = 0, 0.0, {}
    for index in range(store.shards):
        with safe_open(shard_path(store.folder, index), "pt") as shard:
            about = json.loads(shard.metadata()["about"])
        present, seconds = present + about["present"], seconds + about["seconds"]
        for name, value in about["cosines"].items():
            cosines[name] = cosines.get(name, 0.0) + value
    views = store.manifest["fingerprint"]["data.views"]
    size = store.manifest["bytes_per_view"]
    disk = sum(shard_path(store.folder, index).stat().st_size for index in range(store.shards))
    return {
        "format": store.manifest["format"], "images": store.manifest["views"] // views, "views": views,
        "missing": store.manifest["views"] - present, "bytes_per_view": size, "bytes_per_image": size * views,
        "gib": disk / 2**30, "cosine": {name: value / max(present, 1) for name, value in sorted(cosines.items())},
        "build_seconds": seconds, "break_even_epochs": views,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """The summary as text."""
    cosines = ", ".join(f"{name} {value:.5f}" for name, value in found["cosine"].items())
    return [
        f"{found['images']:,} images x {found['views']} views in {found['format']}: {found['bytes_per_image']:,} bytes "
        f"an image, {found['gib']:.3f} GiB; {found['missing']} views missing (broken images)",
        f"cosine of stored with live tokens: {cosines}",
        f"built in {found['build_seconds']:,.0f} s of all its processes; each view costs the teachers one pass, so a "
        f"run saves their work from epoch {found['break_even_epochs'] + 1} on",
    ]
