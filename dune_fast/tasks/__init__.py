"""Training of task heads on a frozen encoder: one file a kind of head, and the run of the engine that trains them.

`head_task` says what a kind gives: its data, its head and its loss. `training` makes a run of it.
"""

from __future__ import annotations

TASKS = {
    "linear_seg": "dune_fast.tasks.linear:Segmentation",
    "linear_depth": "dune_fast.tasks.linear:Depth",
    "mast3r": "dune_fast.tasks.mast3r:Mast3rTask",
    "multihmr": "dune_fast.tasks.multihmr:MultiHmrTask",
}
"""Kind of head (`heads.head.KINDS`) -> module and class of its `head_task.HeadTask`, imported when asked for."""
