"""What a run takes and what a machine can do, before anything is started.

gpus          public facts about GPUs, and what is assumed of them
numbers       a value that says how it is known
describe      steps, arithmetic, memory and disk of a recipe
budget        the longest schedule within some hours on some GPUs
beside        start-up, evaluations and checkpoints
alternatives  the same budget spent otherwise, and what is known of the quality
cached        of these, the run from a cache of features, and its build
scale         many GPUs: bytes of a step against links, storage and decoding
calibrate     some steps on this machine's device, in place of the assumption
output        text and JSON
"""
