"""What a run takes and what a machine can do, before anything is started.

gpus          public facts about GPUs, and what is assumed of them
numbers       a value that says how it is known
describe      steps, arithmetic, memory and disk of a recipe
budget        the longest schedule within some hours on some GPUs
alternatives  the same budget spent otherwise, and what is known of the quality
scale         many GPUs: bytes of a step against links, storage and decoding
calibrate     some steps on this machine's device, in place of the assumption
output        text and JSON
"""
