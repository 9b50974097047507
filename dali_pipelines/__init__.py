"""Images for distillation: what they are (`datasets`), files (`listing`) or shards (`shards`, `foreign_shards`; made by
`sharding`), in which order they come (`order`), who decodes them (`images`), what is done to them (`augmentation`,
`pipeline`) and how they reach the device (`source`, `stream`, `loader`). Annotations are never read.
"""
