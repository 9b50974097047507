"""What a cache holds and costs: bytes an image, how close the stored features are, after how many epochs it pays."""

from __future__ import annotations

from typing import Any

from dune_fast.cache.store import Store, shard_path


def summarize(store: Store) -> dict[str, Any]:
    """Numbers of a complete cache. All is of the tokens that are stored: the cosine of what is decoded with the
    teacher's token, a mean, and `explained`, 1 - squared error / variance of the teacher's tokens over all views."""
    present, seconds, sums = 0, 0.0, {}
    for about in store.about():
        present, seconds = present + about["present"], seconds + about["seconds"]
        for name, values in about["closeness"].items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(values)), values, strict=True)]
    moments = store.moments()
    made, size = store.manifest["fingerprint"], store.manifest["bytes_per_view"]
    views = made["data.views"]
    closeness = {}
    for name, (tokens, cosine, error) in sorted(sums.items()):
        teacher, _, kind = name.rpartition("/")
        variance = float(moments[teacher][kind].std.square().sum())
        closeness[name] = {"cosine": cosine / tokens, "explained": 1 - error / tokens / max(variance, 1e-30)}
    disk = sum(shard_path(store.folder, index).stat().st_size for index in range(store.shards))
    return {
        "format": made["cache.format"], "components": made["cache.components"],
        "patch_share": made["cache.patch_share"], "images": store.manifest["views"] // views, "views": views,
        "missing": store.manifest["views"] - present, "bytes_per_view": size, "bytes_per_image": size * views,
        "gib": disk / 2**30, "tokens": closeness, "build_seconds": seconds, "break_even_epochs": views,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """The summary as text."""
    form = found["format"]
    form += f" of {found['components']} components" if found["components"] else ""
    form += f", {found['patch_share']:.0%} of the patches" if found["patch_share"] < 1 else ""
    return [
        f"{found['images']:,} images x {found['views']} views in {form}: {found['bytes_per_image']:,} bytes "
        f"an image, {found['gib']:.3f} GiB; {found['missing']} views missing (broken images)",
        *(
            f"{name}: cosine of stored with live tokens {near['cosine']:.5f}, {near['explained']:.4%} of the variance"
            for name, near in found["tokens"].items()
        ),
        f"built in {found['build_seconds']:,.0f} s of all its processes; each view costs the teachers one pass, so a "
        f"run saves their work from epoch {found['break_even_epochs'] + 1} on",
    ]
