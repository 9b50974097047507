"""Images for distillation. Annotations are never read.

What there is: `datasets`, made of files (`listing`) or of shards (`shards`, `foreign_shards`, both by `tar_index`).
What a step holds: `order` and `augmentation`, put together by `plan`; bytes come from `source`, which `images` turns
into what DALI takes. How it gets to the device: `pipeline`, `decode`, `loader`. Making shards: `sharding`.
"""
