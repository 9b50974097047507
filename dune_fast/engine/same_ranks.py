"""What has to be the same on all ranks, compared when a run starts: code, packages, configuration, images, folder."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dune_fast.dali_pipelines.datasets import Dataset
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.config import RunConfig, as_dict, flatten
from dune_fast.engine.launch import processors, shared_threads
from dune_fast.engine.provenance import files_hash, gather, packages

_FOLDER_SECONDS = 60.0
"""How long a rank waits for what rank 0 has written: network file systems remember for a while what was not there."""
_SHOWN = 3  # differences that a message lists
_NAMES = 4096  # images of a dataset whose names are compared


def refuse_differences(mine: Mapping[str, Any], hosts: Sequence[str], cure: str) -> None:
    """Compares named values with rank 0's. All ranks call it.

    Raises:
        ValueError: on every rank; names the first rank that has others, its host, and what differs.
    """
    first, *others = gather(dict(mine))
    for rank, theirs in enumerate(others, 1):
        names = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
        if names:
            shown = "; ".join(f"{name} is {theirs.get(name)}, not {first.get(name)}" for name in names[:_SHOWN])
            more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                f"rank {rank} on {hosts[rank]} differs from rank 0 on {hosts[0]}: {shown}{more}. {cure}, then start "
                "the command again"
            )


def meet(cfg: RunConfig) -> list[str]:
    """The hosts of all ranks, once they have seen that they belong together. All ranks call it first.

    Ranks that share processors share them out.

    Raises:
        ValueError: on every rank, if one has other code, packages or another configuration.
    """
    hosts, place = gather(socket.gethostname()), processors()
    if threads := shared_threads(os.environ, gather(place).count(place)):
        torch.set_num_threads(threads)
    code = {f"version of {name}": version for name, version in packages().items()}
    code["hash of the source files"] = files_hash([Path(__file__).parents[1]], (".py",))
    refuse_differences(code, hosts, "Install the same code and packages on all machines")
    refuse_differences(flatten(as_dict(cfg)), hosts, "Give all ranks the same configuration files and overrides")
    return hosts


def fingerprint(datasets: Sequence[Dataset]) -> dict[str, str]:
    """Dataset and split -> number of images, and a hash of the names of up to 4096 of them, evenly spread."""
    found = {}
    for dataset in datasets:
        for split, images in (("training", dataset.train), ("validation", dataset.val)):
            digest = hashlib.blake2b(digest_size=8)
            for index in np.linspace(0, len(images) - 1, min(len(images), _NAMES)).astype(int):
                digest.update(images.relative(int(index)).encode("utf-8", "surrogateescape") + b"\0")
            found[f"{split} images of dataset {dataset.name}"] = f"{len(images)} (names {digest.hexdigest()})"
    return found


def refuse_other_data(datasets: Sequence[Dataset], hosts: Sequence[str]) -> None:
    """ValueError unless all ranks have found the same images."""
    cure = "Show all machines the same images under the same paths, and make an old index anew"
    refuse_differences(fingerprint(datasets), hosts, cure)


def refuse_own_folders(run: Path, hosts: Sequence[str]) -> None:
    """ValueError unless all ranks see, and can write to, the folder that rank 0 has made. All ranks call it."""
    rank = dist.get_rank()
    if len(hosts) == 1:
        return
    name = [f".shared.{secrets.token_hex(6)}"]
    dist.broadcast_object_list(name)
    mark = run / name[0]
    if rank == 0:
        write_whole(mark, b"rank 0 was here\n")
    try:
        dist.broadcast_object_list([None])  # it is written
        faults = gather(_folder_fault(mark, rank))
    finally:
        if rank == 0:
            mark.unlink(missing_ok=True)
    if other := [f"rank {r} on {hosts[r]} {fault}" for r, fault in enumerate(faults) if fault]:
        raise ValueError(
            f"output_dir={run} is not one folder for all ranks: {'; '.join(other[:_SHOWN])}. Rank 0 on {hosts[0]} has "
            f"made {run.resolve()}: choose an output_dir on a file system that all machines share, where all of them "
            "may write"
        )


def _folder_fault(mark: Path, rank: int) -> str:
    """What is wrong with the folder from this rank's point of view; empty if nothing is."""
    give_up = time.monotonic() + _FOLDER_SECONDS
    while not mark.exists():
        if time.monotonic() > give_up:
            return f"does not see in {mark.parent.resolve()} what rank 0 has written"
        time.sleep(0.1)
    own = mark.with_name(f"{mark.name}.{rank}")
    try:
        write_whole(own, b"")
        own.unlink()
    except OSError as error:
        return f"cannot write to {mark.parent.resolve()} ({error.strerror})"
    return ""
